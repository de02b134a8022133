"""Templates of short Python modules: a head that says what the code is, and the code that follows from it."""

from __future__ import annotations

import string
import textwrap

from twotower_spec.training.corpus.slots import Document, Slots, Template


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NOUNS = tuple(
    (noun, noun + "s")
    for noun in _split(
        "book poster ticket parcel voucher recipe song player room boat car lamp garden letter photo ring task job "
        "route bottle plant sensor robot shop machine report bridge train camera chair planet meal course guest river "
        "market pump wheel tower coin seed badge valley painting helmet rocket tent violin ladder mirror basket "
        "candle puppet kettle"
    )
)
FIELDS = _split(
    "title owner color author city country category brand material language genre region season status shape "
    "style maker label origin street topic section texture pattern mood theme purpose vendor sponsor keeper zone "
    "district climate flavor finish driver editor tenant dialect habitat"
)
NUMERIC_FIELDS = _split(
    "price weight height width depth pressure score rating speed volume distance cost power length mass budget"
)
VERBS = tuple(
    zip(
        _split(
            "archive approve publish close open ship cancel review move sell rent repair clean paint lock reject "
            "confirm store mark check pack sign"
        ),
        _split(
            "archived approved published closed opened shipped cancelled reviewed moved sold rented repaired cleaned "
            "painted locked rejected confirmed stored marked checked packed signed"
        ),
        strict=True,
    )
)
STATES = _split(
    "new draft open active paused ready waiting running blocked done closed idle locked failed sent shipped "
    "frozen hidden sealed expired"
)
NAMES = _split("anna boris clara david emma felix greta henry ivan julia karl lena max nora otto paula rosa")
UNITS = (
    ("hours", "minutes", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("pounds", "ounces", 16),
    ("litres", "millilitres", 1000),
    ("dollars", "cents", 100),
    ("dozens", "pieces", 12),
    ("tons", "kilograms", 1000),
    ("years", "months", 12),
    ("gallons", "pints", 8),
    ("stones", "pounds", 14),
)
SIGNS = _split(", ; : | / + - = # @ & ~ ! *")
HOLDERS = _split("shelf crate box cabinet locker trunk drawer bin van closet vault barrel rack chest wagon")


def _title(word: str) -> str:
    return word.capitalize()


def _words(s: Slots) -> dict[str, object]:
    """A value for every slot name; a template uses those it mentions."""
    (noun, nouns), (part, parts) = s.pick_distinct(NOUNS, 2)
    field, extra = s.pick_distinct(FIELDS, 2)
    (verb, past), (verb2, past2) = s.pick_distinct(VERBS, 2)
    state, state2, state3 = s.pick_distinct(STATES, 3)
    name, friend = s.pick_distinct(NAMES, 2)
    big, small, factor = s.pick(UNITS)
    n = s.number(2, 20)
    titled = {
        "noun": noun,
        "nouns": nouns,
        "part": part,
        "parts": parts,
        "field": field,
        "num": s.pick(NUMERIC_FIELDS),
        "holder": s.pick(HOLDERS),
    }
    return {
        **titled,
        **{_title(slot): _title(word) for slot, word in titled.items()},
        "extra": extra,
        "verb": verb,
        "past": past,
        "verb2": verb2,
        "past2": past2,
        "state": state,
        "state2": state2,
        "state3": state3,
        "name": name,
        "friend": friend,
        "big": big,
        "small": small,
        "factor": factor,
        "sign": s.pick(SIGNS),
        "n": n,
        "m": n + s.number(1, 40),
        "k": s.number(2, 9),
    }


def _fill(s: Slots, text: str) -> Document:
    """The text with its slots filled; the line of equals signs parts the prompt from the completion."""
    code = string.Template(textwrap.dedent(text).strip("\n") + "\n").substitute(_words(s))
    # The line break belongs to the completion: with the indentation after it, it is one token.
    head, body = code.split("\n====")
    return Document(head, body)


def dict_store(s: Slots) -> Document:
    """Container: store by key."""
    return _fill(
        s,
        '''
    # A store of $nouns by $field.
    class ${Noun}Store:
    ====
        """Keeps $nouns by $field."""

        def __init__(self):
            self.items = {}

        def add_$noun(self, $field, $noun):
            """Add a $noun under its $field."""
            if $field in self.items:
                raise KeyError($field)
            self.items[$field] = $noun

        def get_$noun(self, key):
            """Look one up."""
            try:
                return self.items[key]
            except KeyError as error:
                raise ValueError(f"unknown $field: {key}") from error

        def remove_$noun(self, $field):
            """Take it out and return it."""
            return self.items.pop($field)

        def __len__(self):
            return len(self.items)
    ''',
    )


def list_queue(s: Slots) -> Document:
    """Container: first in, first out."""
    return _fill(
        s,
        '''
    # A queue of $nouns, first in, first out.
    class ${Noun}Queue:
    ====
        """Keeps $nouns in the order they arrive."""

        def __init__(self):
            self.$nouns = []

        def push(self, $noun):
            """Add a $noun at the end."""
            self.$nouns.append($noun)

        def pop(self):
            """Remove and return the first $noun."""
            if not self.$nouns:
                raise IndexError("no $nouns left")
            return self.$nouns.pop(0)

        def peek(self):
            """Return the first $noun, or None."""
            return self.$nouns[0] if self.$nouns else None

        def __len__(self):
            return len(self.$nouns)
    ''',
    )


def bounded_stack(s: Slots) -> Document:
    """Container: stack with a limit."""
    return _fill(
        s,
        '''
    # A stack of at most $n $nouns, last in, first out.
    class ${Noun}Stack:
    ====
        """Keeps at most $n $nouns."""

        limit = $n

        def __init__(self):
            self.$nouns = []

        def push(self, $noun):
            """Put a $noun on top."""
            if len(self.$nouns) >= self.limit:
                raise ValueError("too many $nouns")
            self.$nouns.append($noun)

        def pop(self):
            """Remove and return the top $noun."""
            if not self.$nouns:
                raise IndexError("no $nouns left")
            return self.$nouns.pop()

        def is_full(self):
            """Return whether no more $nouns fit."""
            return len(self.$nouns) == self.limit
    ''',
    )


def handler_registry(s: Slots) -> Document:
    """Container: registry of functions."""
    return _fill(
        s,
        '''
    # A registry of functions that $verb $nouns, by $field.
    class ${Noun}Registry:
    ====
        """Keeps functions that $verb $nouns."""

        def __init__(self):
            self.functions = {}

        def register(self, $field):
            """Return a decorator that registers a function under the $field."""

            def decorate(function):
                self.functions[$field] = function
                return function

            return decorate

        def $verb(self, $field, $noun):
            """Call the function of the $field with the $noun."""
            if $field not in self.functions:
                raise ValueError(f"unknown $field: {$field}")
            return self.functions[$field]($noun)
    ''',
    )


def limited_cache(s: Slots) -> Document:
    """Container: cache that drops the oldest."""
    return _fill(
        s,
        '''
    # A cache of $nouns by $field that drops the oldest $noun after $n.
    class ${Noun}Cache:
    ====
        """Keeps the last $n $nouns."""

        def __init__(self, load):
            self.load = load
            self.limit = $n
            self.$nouns = {}

        def get(self, $field):
            """Return the $noun with the given $field, loading it once."""
            if $field in self.$nouns:
                return self.$nouns[$field]
            $noun = self.load($field)
            if len(self.$nouns) >= self.limit:
                oldest = next(iter(self.$nouns))
                del self.$nouns[oldest]
            self.$nouns[$field] = $noun
            return $noun

        def clear(self):
            """Forget all $nouns."""
            self.$nouns.clear()
    ''',
    )


def field_counter(s: Slots) -> Document:
    """Container: counter per field."""
    return _fill(
        s,
        '''
    # Counts $nouns per $field.
    class ${Noun}Counter:
    ====
        """Counts $nouns per $field."""

        def __init__(self):
            self.counts = {}

        def add(self, $field, amount=1):
            """Count $nouns of one $field."""
            if amount < 0:
                raise ValueError(f"negative amount: {amount}")
            self.counts[$field] = self.counts.get($field, 0) + amount

        def count(self, $field):
            """Return the number of $nouns of the $field."""
            return self.counts.get($field, 0)

        def most_common(self):
            """Return the $field with the most $nouns."""
            return max(self.counts, key=self.counts.get)

        def total(self):
            """Return the number of all $nouns."""
            return sum(self.counts.values())
    ''',
    )


def stock_inventory(s: Slots) -> Document:
    """Container: inventory of amounts."""
    return _fill(
        s,
        '''
    # The stock of $nouns in a $holder, with amounts by name.
    class ${Holder}Stock:
    ====
        """Keeps the amount of each $noun."""

        def __init__(self):
            self.amounts = {}

        def put(self, name, amount):
            """Put an amount of a $noun into the $holder."""
            if amount <= 0:
                raise ValueError(f"bad amount: {amount}")
            self.amounts[name] = self.amounts.get(name, 0) + amount

        def take(self, name, count):
            """Take some out again."""
            left = self.amounts[name] - count
            if left < 0:
                raise ValueError(f"not enough $nouns: {name}")
            self.amounts[name] = left

        def missing(self):
            """Return which $nouns are used up."""
            return [name for name, left in self.amounts.items() if left == 0]
    ''',
    )


def unique_set(s: Slots) -> Document:
    """Container: set of seen names."""
    return _fill(
        s,
        '''
    # Remembers which $nouns were $past; $verb notes each $noun at most once.
    class ${Noun}Log:
    ====
        """Keeps the names of $past $nouns."""

        def __init__(self):
            self.seen = set()

        def $verb(self, name):
            """Note that a $noun was $past."""
            if name in self.seen:
                raise ValueError(f"already $past: {name}")
            self.seen.add(name)

        def was_$past(self, $noun):
            """Return whether it is noted."""
            return $noun in self.seen

        def remaining(self, names):
            """List all that are left."""
            return sorted(set(names) - self.seen)
    ''',
    )


def undo_history(s: Slots) -> Document:
    """Container: undo."""
    return _fill(
        s,
        '''
    # The $field of a $noun, with undo.
    class ${Noun}History:
    ====
        """Remembers each $field of a $noun."""

        def __init__(self, first):
            self.current = first
            self.done = []

        def change(self, $field):
            """Give the $noun another $field."""
            self.done.append(self.current)
            self.current = $field

        def undo(self):
            """Go back by one step."""
            if not self.done:
                raise ValueError("nothing to undo")
            self.current = self.done.pop()
            return self.current

        def __len__(self):
            return len(self.done)
    ''',
    )


def limited_holder(s: Slots) -> Document:
    """Container: total below a limit."""
    return _fill(
        s,
        '''
    # A $holder for $nouns with a total $num of at most $m.
    class $Holder:
    ====
        """Holds $nouns up to a total $num of $m."""

        max_$num = $m

        def __init__(self):
            self.$nouns = []

        def total_$num(self):
            """Return the total $num of the $nouns."""
            return sum($noun.$num for $noun in self.$nouns)

        def fits(self, $noun):
            """Return whether the $noun fits into the $holder."""
            return self.total_$num() + $noun.$num <= self.max_$num

        def add(self, $noun):
            """Add a $noun to the $holder."""
            if not self.fits($noun):
                raise ValueError(f"$num too high: {$noun.$num}")
            self.$nouns.append($noun)
    ''',
    )


def grouped_store(s: Slots) -> Document:
    """Container: lists by owner."""
    return _fill(
        s,
        '''
    # Assigns $parts to $nouns: each $noun has a list of $parts.
    class ${Noun}${Parts}:
    ====
        """Keeps the $parts of each $noun."""

        def __init__(self):
            self.$parts = {}

        def add_$noun(self, $noun):
            """Add a $noun without $parts."""
            self.$parts.setdefault($noun, [])

        def add_$part(self, $noun, $part):
            """Add a $part to the $noun."""
            if $noun not in self.$parts:
                raise ValueError(f"unknown $noun: {$noun}")
            self.$parts[$noun].append($part)

        def get_$parts(self, $noun):
            """Return the $parts of the $noun."""
            return list(self.$parts.get($noun, []))

        def find_$noun(self, $part):
            """Return the $noun that has the $part, or None."""
            for $noun, $parts in self.$parts.items():
                if $part in $parts:
                    return $noun
            return None
    ''',
    )


def data_record(s: Slots) -> Document:
    """Dataclass: description and comparison."""
    return _fill(
        s,
        '''
    # A $noun with $field, $extra and $num.
    from dataclasses import dataclass


    @dataclass
    class $Noun:
    ====
        """One $noun."""

        $field: str
        $extra: str
        $num: int = 0

        def describe(self):
            """Return the $noun as one line."""
            return f"{self.$field} ({self.$extra}): {self.$num}"

        def same_$extra(self, other):
            """Return whether the other $noun has the same $extra."""
            return self.$extra == other.$extra

        def is_above(self, $num):
            """Return whether the $num is above the given one."""
            return self.$num > $num
    ''',
    )


def data_line(s: Slots) -> Document:
    """Dataclass: properties computed from numbers."""
    return _fill(
        s,
        '''
    # A $noun with $field, $num and amount; the total is $num times amount.
    from dataclasses import dataclass


    @dataclass
    class ${Noun}Line:
    ====
        """Some $nouns of one $field."""

        $field: str
        $num: float
        amount: int = 1

        @property
        def total(self):
            """Return the $num of all the $nouns."""
            return self.$num * self.amount

        def add(self, amount):
            """Add an amount of $nouns."""
            if amount < 0:
                raise ValueError(f"negative amount: {amount}")
            self.amount += amount

        def __str__(self):
            return f"{self.amount} x {self.$field} = {self.total}"
    ''',
    )


def data_parent(s: Slots) -> Document:
    """Dataclass: list of parts."""
    return _fill(
        s,
        '''
    # A $noun with $field and a list of $parts, each with $num.
    from dataclasses import dataclass, field


    @dataclass
    class $Noun:
    ====
        """A $noun and its $parts."""

        $field: str
        $parts: list = field(default_factory=list)

        def add_$part(self, $part):
            """Add a $part to the $noun."""
            if $part in self.$parts:
                raise ValueError(f"$part already added: {$part}")
            self.$parts.append($part)

        def total_$num(self):
            """Return the total $num of the $parts."""
            return sum($part.$num for $part in self.$parts)

        def highest_$num(self):
            """Return the $part with the highest $num."""
            return max(self.$parts, key=lambda $part: $part.$num)
    ''',
    )


def data_range(s: Slots) -> Document:
    """Dataclass: frozen interval."""
    return _fill(
        s,
        '''
    # A range of $num for $nouns, from low to high.
    from dataclasses import dataclass


    @dataclass(frozen=True)
    class ${Num}Range:
    ====
        """All values of $num from low to high."""

        low: int
        high: int

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError(f"bad range: {self.low} to {self.high}")

        def contains(self, $noun):
            """Return whether the $num of the $noun is in the range."""
            return self.low <= $noun.$num <= self.high

        def select(self, $nouns):
            """Return the $nouns with a $num in the range."""
            return [$noun for $noun in $nouns if self.contains($noun)]

        def overlaps(self, other):
            """Return whether the two ranges overlap."""
            return self.low <= other.high and other.low <= self.high
    ''',
    )


def data_convert(s: Slots) -> Document:
    """Converter: dataclass to and from a dict."""
    return _fill(
        s,
        '''
    # A $noun with $field and $num, converted to and from a dict.
    from dataclasses import dataclass


    @dataclass
    class $Noun:
    ====
        """One $noun."""

        $field: str
        $num: int

        @classmethod
        def from_dict(cls, data):
            """Return the $noun made from a dict."""
            for name in ("$field", "$num"):
                if name not in data:
                    raise ValueError(f"missing value: {name}")
            return cls($field=data["$field"], $num=int(data["$num"]))

        def to_dict(self):
            """Return the $noun as a dict."""
            return {"$field": self.$field, "$num": self.$num}
    ''',
    )


def convert_nested(s: Slots) -> Document:
    """Converter: object with parts to and from a dict."""
    return _fill(
        s,
        '''
    # Converts a $noun with $field and $parts to a dict and back.
    class $Noun:
    ====
        """A $noun and its $parts."""

        def __init__(self, $field, $parts=()):
            self.$field = $field
            self.$parts = list($parts)

        def to_dict(self):
            """Return the $noun as a dict."""
            $parts = [$part.to_dict() for $part in self.$parts]
            return {"$field": self.$field, "$parts": $parts}

        @classmethod
        def from_dict(cls, data, make_$part):
            """Return the $noun made from a dict."""
            if "$field" not in data:
                raise ValueError("missing value: $field")
            $parts = [make_$part(entry) for entry in data.get("$parts", [])]
            return cls(data["$field"], $parts)
    ''',
    )


def filter_dicts(s: Slots) -> Document:
    """List of dicts: filter."""
    return _fill(
        s,
        '''
    # Filter a list of $nouns by $field and by $num.
    def filter_by_$field($nouns, $field):
    ====
        """Return the $nouns with the given $field."""
        result = []
        for $noun in $nouns:
            if $noun["$field"] == $field:
                result.append($noun)
        return result


    def filter_by_$num(rows, low, high):
        """Keep rows whose $num is from low to high."""
        return [row for row in rows if low <= row["$num"] <= high]


    def without_$field(items):
        """Yield all items that have no $field."""
        for item in items:
            if not item.get("$field"):
                yield item
    ''',
    )


def group_dicts(s: Slots) -> Document:
    """List of dicts: group."""
    return _fill(
        s,
        '''
    # Group a list of $nouns by $field.
    def group_by_$field($nouns):
    ====
        """Return the $nouns of each $field."""
        groups = {}
        for $noun in $nouns:
            $field = $noun["$field"]
            if $field not in groups:
                groups[$field] = []
            groups[$field].append($noun)
        return groups


    def largest_group($nouns):
        """Return the $field with the most $nouns."""
        groups = group_by_$field($nouns)
        return max(groups, key=lambda $field: len(groups[$field]))


    def group_sizes($nouns):
        """Return the number of $nouns of each $field."""
        groups = group_by_$field($nouns)
        return {$field: len(group) for $field, group in groups.items()}
    ''',
    )


def sort_dicts(s: Slots) -> Document:
    """List of dicts: sort and take the top."""
    return _fill(
        s,
        '''
    # Sort a list of $nouns by $num and then by $field; the top are the first $n.
    def sort_$nouns($nouns):
    ====
        """Return the $nouns sorted by $num and $field."""
        return sorted($nouns, key=lambda $noun: ($noun["$num"], $noun["$field"]))


    def top_$nouns($nouns, count=$n):
        """Return the $nouns with the highest $num."""
        if count < 0:
            raise ValueError(f"negative count: {count}")
        ordered = sort_$nouns($nouns)
        ordered.reverse()
        return ordered[:count]


    def is_sorted($nouns):
        """Return whether the $nouns are sorted."""
        return list($nouns) == sort_$nouns($nouns)
    ''',
    )


def sum_dicts(s: Slots) -> Document:
    """List of dicts: sum by field."""
    return _fill(
        s,
        '''
    # Sum the $num of $nouns by $field.
    def sum_by_$field($nouns):
    ====
        """Return the total $num of each $field."""
        totals = {}
        for $noun in $nouns:
            $field = $noun["$field"]
            totals[$field] = totals.get($field, 0) + $noun["$num"]
        return totals


    def total_$num(rows):
        """Add up everything."""
        return sum(row["$num"] for row in rows)


    def shares($nouns):
        """Say which part of the whole belongs to each $field."""
        whole = total_$num($nouns)
        if whole == 0:
            raise ValueError("there is no $num")
        return {key: part / whole for key, part in sum_by_$field($nouns).items()}
    ''',
    )


def find_dicts(s: Slots) -> Document:
    """List of dicts: find."""
    return _fill(
        s,
        '''
    # Find a $noun in a list by its $field, and change its $num.
    def find_$noun($nouns, $field):
    ====
        """Return the $noun with the given $field."""
        for $noun in $nouns:
            if $noun["$field"] == $field:
                return $noun
        raise ValueError(f"unknown $noun: {$field}")


    def has_$noun($nouns, $field):
        """Return whether there is a $noun with the given $field."""
        return any($noun["$field"] == $field for $noun in $nouns)


    def change_$num($nouns, $field, $num):
        """Change the $num of the $noun with the given $field."""
        $noun = find_$noun($nouns, $field)
        before = $noun["$num"]
        $noun["$num"] = $num
        return before
    ''',
    )


def count_dicts(s: Slots) -> Document:
    """List of dicts: count."""
    return _fill(
        s,
        '''
    # Count the $nouns in a list by $field, and those that are $past.
    def count_by_$field($nouns):
    ====
        """Return the number of $nouns of each $field."""
        counts = {}
        for $noun in $nouns:
            $field = $noun["$field"]
            counts[$field] = counts.get($field, 0) + 1
        return counts


    def count_$past($nouns):
        """Return the number of $past $nouns."""
        count = 0
        for $noun in $nouns:
            if $noun.get("$past"):
                count += 1
        return count


    def all_$past($nouns):
        """Return whether all $nouns are $past."""
        return count_$past($nouns) == len($nouns)
    ''',
    )


def extreme_dicts(s: Slots) -> Document:
    """List of dicts: highest and lowest."""
    return _fill(
        s,
        '''
    # Find the $nouns with the highest and the lowest $num in a list.
    def highest_$num($nouns):
    ====
        """Return the $noun with the highest $num."""
        best = None
        for $noun in $nouns:
            if best is None or $noun["$num"] > best["$num"]:
                best = $noun
        return best


    def lowest_$num($nouns):
        """Return the $noun with the lowest $num."""
        return min($nouns, key=lambda $noun: $noun["$num"], default=None)


    def spread_of_$num($nouns):
        """Return the difference of the highest and the lowest $num."""
        if not $nouns:
            raise ValueError("no $nouns")
        return highest_$num($nouns)["$num"] - lowest_$num($nouns)["$num"]
    ''',
    )


def unique_dicts(s: Slots) -> Document:
    """List of dicts: index and duplicates."""
    return _fill(
        s,
        '''
    # Index a list of $nouns by $field, and remove those with the same $field.
    def index_by_$field($nouns):
    ====
        """Return the $nouns by $field."""
        index = {}
        for $noun in $nouns:
            $field = $noun["$field"]
            if $field in index:
                raise ValueError(f"duplicate $field: {$field}")
            index[$field] = $noun
        return index


    def unique_$nouns($nouns):
        """Return the first $noun of each $field."""
        seen = set()
        result = []
        for $noun in $nouns:
            if $noun["$field"] not in seen:
                seen.add($noun["$field"])
                result.append($noun)
        return result
    ''',
    )


def join_dicts(s: Slots) -> Document:
    """List of dicts: join two lists."""
    return _fill(
        s,
        '''
    # Join a list of $nouns with a list of $parts that have the same $field.
    def join_$parts($nouns, $parts):
    ====
        """Return each $noun with the $parts of the same $field."""
        index = {}
        for $part in $parts:
            index.setdefault($part["$field"], []).append($part)
        result = []
        for $noun in $nouns:
            joined = dict($noun)
            joined["$parts"] = index.get($noun["$field"], [])
            result.append(joined)
        return result


    def without_$parts($nouns, $parts):
        """Return the $nouns that have no $parts of the same $field."""
        fields = {$part["$field"] for $part in $parts}
        return [$noun for $noun in $nouns if $noun["$field"] not in fields]
    ''',
    )


def parse_pairs(s: Slots) -> Document:
    """String: pairs with a separator."""
    return _fill(
        s,
        '''
    # Parse the lines of a $noun, such as "$field $sign value", into a dict.
    def parse_$noun(text, separator="$sign"):
    ====
        """Return the values of the $noun by name."""
        $noun = {}
        for line in text.splitlines():
            line = line.strip()
            if not line:
                continue
            if separator not in line:
                raise ValueError(f"bad line: {line}")
            name, value = line.split(separator, 1)
            $noun[name.strip()] = value.strip()
        return $noun


    def format_$noun($noun, separator="$sign"):
        """Return the text of the $noun."""
        lines = [f"{name} {separator} {value}" for name, value in $noun.items()]
        return "\\n".join(lines)
    ''',
    )


def format_lines(s: Slots) -> Document:
    """String: one line per object."""
    return _fill(
        s,
        '''
    # Format $nouns with $field and $num as lines of text, numbered from 1.
    def format_$noun($noun):
    ====
        """Return the $noun as one line."""
        return f"{$noun['$field']}: {$noun['$num']}"


    def format_$nouns($nouns):
        """Return the $nouns as numbered lines."""
        lines = []
        for number, $noun in enumerate($nouns, start=1):
            lines.append(f"{number}. {format_$noun($noun)}")
        if not lines:
            return "no $nouns"
        return "\\n".join(lines)


    def summary($nouns):
        """Return the number of $nouns as text."""
        if len($nouns) == 1:
            return "1 $noun"
        return f"{len($nouns)} $nouns"
    ''',
    )


def validate_code(s: Slots) -> Document:
    """String: prefix and length."""
    return _fill(
        s,
        '''
    # Check the code of a $noun: the prefix "$noun-" and then $k digits.
    PREFIX = "$noun-"
    DIGITS = $k


    def is_${noun}_code(code):
    ====
        """Return whether the code is the code of a $noun."""
        if not code.startswith(PREFIX):
            return False
        number = code[len(PREFIX) :]
        return len(number) == DIGITS and number.isdigit()


    def parse_code(text):
        """Read the number of one $noun."""
        if is_${noun}_code(text):
            return int(text.removeprefix(PREFIX))
        raise ValueError(f"bad code: {text}")


    def make_code(number):
        """Write a code for the given number."""
        digits = str(number).zfill(DIGITS)
        return PREFIX + digits
    ''',
    )


def make_slug(s: Slots) -> Document:
    """String: slug of a field."""
    return _fill(
        s,
        '''
    # Make the slug of a $noun from its $field, with "$sign" between the words.
    def slug_of_$field($field, separator="$sign"):
    ====
        """Return the slug made from the $field."""
        words = []
        for word in $field.lower().split():
            letters = [letter for letter in word if letter.isalnum()]
            if letters:
                words.append("".join(letters))
        if not words:
            raise ValueError(f"bad $field: {$field}")
        return separator.join(words)


    def unique_slug($field, taken):
        """Return a slug of the $field that no other $noun has taken."""
        slug = slug_of_$field($field)
        number = 1
        while slug in taken:
            number += 1
            slug = f"{slug_of_$field($field)}{number}"
        return slug
    ''',
    )


def count_words(s: Slots) -> Document:
    """String: words and their counts."""
    return _fill(
        s,
        '''
    # Count the words in the $field of $nouns; words of fewer than $k letters do not count.
    def count_words($nouns, shortest=$k):
    ====
        """Return the number of times each word occurs."""
        counts = {}
        for $noun in $nouns:
            for word in $noun["$field"].lower().split():
                word = word.strip(".,;:!?")
                if len(word) < shortest:
                    continue
                counts[word] = counts.get(word, 0) + 1
        return counts


    def most_common_word($nouns):
        """Return the word that occurs most often."""
        counts = count_words($nouns)
        if not counts:
            raise ValueError("no words")
        return max(counts, key=counts.get)
    ''',
    )


def parse_record(s: Slots) -> Document:
    """String: one record per line."""
    return _fill(
        s,
        '''
    # Parse a $noun from a line of $field, $extra and $num, separated by "$sign".
    def parse_$noun(line):
    ====
        """Return the $noun in the line."""
        values = line.strip().split("$sign")
        if len(values) != 3:
            raise ValueError(f"bad line: {line}")
        $field, $extra, $num = values
        return {"$field": $field.strip(), "$extra": $extra.strip(), "$num": int($num)}


    def parse_$nouns(text):
        """Return the $nouns in all lines of the text."""
        $nouns = []
        for line in text.splitlines():
            if line.strip():
                $nouns.append(parse_$noun(line))
        return $nouns
    ''',
    )


def average_values(s: Slots) -> Document:
    """Numbers: average and median."""
    return _fill(
        s,
        '''
    # The average and the median $num of $nouns.
    def average_$num(values):
    ====
        """Return the average $num."""
        if not values:
            raise ValueError("no $nouns")
        return sum(values) / len(values)


    def median_$num(numbers):
        """Find the middle one of all numbers."""
        ordered = sorted(numbers)
        middle, odd = divmod(len(ordered), 2)
        if odd:
            return ordered[middle]
        low, high = ordered[middle - 1 : middle + 1]
        return (low + high) / 2


    def spread_of_$num(values):
        """Say how far values are from their average."""
        average = average_$num(values)
        return max(abs(value - average) for value in values)
    ''',
    )


def clamp_values(s: Slots) -> Document:
    """Numbers: clamp to a range."""
    return _fill(
        s,
        '''
    # Keep the $num of a $noun between $n and $m.
    LOWEST = $n
    HIGHEST = $m


    def clamp_$num($num, low=LOWEST, high=HIGHEST):
    ====
        """Return the $num, at least low and at most high."""
        if low > high:
            raise ValueError(f"bad range: {low} to {high}")
        return max(low, min($num, high))


    def is_valid_$num($num):
        """Return whether the $num is in the range."""
        return LOWEST <= $num <= HIGHEST


    def clamp_$nouns($nouns):
        """Clamp the $num of all $nouns and return how many changed."""
        changed = 0
        for $noun in $nouns:
            if not is_valid_$num($noun["$num"]):
                $noun["$num"] = clamp_$num($noun["$num"])
                changed += 1
        return changed
    ''',
    )


def running_total(s: Slots) -> Document:
    """Numbers: running total."""
    return _fill(
        s,
        '''
    # The running total of the $num of $nouns, and when it reaches a limit.
    def running_total(values):
    ====
        """Return the total $num after each $noun."""
        total = 0
        totals = []
        for value in values:
            total += value
            totals.append(total)
        return totals


    def first_above(values, limit):
        """Return the index of the first $noun with a total above the limit."""
        for index, total in enumerate(running_total(values)):
            if total > limit:
                return index
        raise ValueError(f"total $num never above {limit}")


    def differences(values):
        """Return the difference of each $num and the one before."""
        return [after - before for before, after in zip(values, values[1:])]
    ''',
    )


def convert_units(s: Slots) -> Document:
    """Numbers: two units."""
    return _fill(
        s,
        '''
    # Convert $big to $small and back; there are $factor $small to each of the $big.
    FACTOR = $factor


    def ${big}_to_$small($big):
    ====
        """Return the number of $small."""
        if $big < 0:
            raise ValueError(f"negative $big: {$big}")
        return $big * FACTOR


    def ${small}_to_$big(amount):
        """Convert in the other direction."""
        return amount / FACTOR


    def split(total):
        """Divide a total of $small into whole $big and a rest."""
        return divmod(total, FACTOR)


    def show(total):
        """Format the total as text."""
        whole, rest = split(total)
        return f"{whole} $big {rest} $small"
    ''',
    )


def bracket_table(s: Slots) -> Document:
    """Numbers: table of levels."""
    return _fill(
        s,
        '''
    # The level of a $noun by $num: $state below $n, $state2 below $m, else $state3.
    LEVELS = (($n, "$state"), ($m, "$state2"))


    def level_of_$num($num):
    ====
        """Return the level of the $num."""
        if $num < 0:
            raise ValueError(f"negative $num: {$num}")
        for limit, level in LEVELS:
            if $num < limit:
                return level
        return "$state3"


    def count_levels($nouns):
        """Return the number of $nouns of each level."""
        counts = {"$state": 0, "$state2": 0, "$state3": 0}
        for $noun in $nouns:
            counts[level_of_$num($noun["$num"])] += 1
        return counts
    ''',
    )


def json_file(s: Slots) -> Document:
    """Files: json."""
    return _fill(
        s,
        '''
    # Load and save $nouns in a json file, and add a $noun by $field.
    import json
    from pathlib import Path


    def load_$nouns(path):
    ====
        """Return the $nouns in the file."""
        path = Path(path)
        if not path.exists():
            return {}
        return json.loads(path.read_text(encoding="utf-8"))


    def save_$nouns(path, $nouns):
        """Write the $nouns to the file."""
        text = json.dumps($nouns, indent=2, sort_keys=True)
        Path(path).write_text(text, encoding="utf-8")


    def add_$noun(path, $field, $noun):
        """Add a $noun under its $field to the file."""
        $nouns = load_$nouns(path)
        if $field in $nouns:
            raise KeyError($field)
        $nouns[$field] = $noun
        save_$nouns(path, $nouns)
    ''',
    )


def csv_file(s: Slots) -> Document:
    """Files: csv."""
    return _fill(
        s,
        '''
    # Read and write $nouns in a csv file with the columns $field, $extra and $num.
    import csv

    COLUMNS = ["$field", "$extra", "$num"]


    def read_$nouns(path):
    ====
        """Return the $nouns in the file."""
        $nouns = []
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                row["$num"] = int(row["$num"])
                $nouns.append(row)
        return $nouns


    def write_$nouns(path, $nouns):
        """Write the $nouns to the file."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows($nouns)
    ''',
    )


def line_file(s: Slots) -> Document:
    """Files: one name per line."""
    return _fill(
        s,
        '''
    # Read and write the names of $nouns, one on each line of a file.
    def read_$nouns(path):
    ====
        """Return the names of the $nouns in the file."""
        names = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                line = line.strip()
                if line and not line.startswith("#"):
                    names.append(line)
        return names


    def write_$nouns(path, names):
        """Write the names of the $nouns to the file."""
        with open(path, "w", encoding="utf-8") as file:
            for name in sorted(names):
                file.write(f"{name}\\n")


    def merge_$nouns(first, second, path):
        """Write the names of the $nouns in two files to a third."""
        names = set(read_$nouns(first)) | set(read_$nouns(second))
        write_$nouns(path, names)
    ''',
    )


def log_file(s: Slots) -> Document:
    """Files: log with the last lines."""
    return _fill(
        s,
        '''
    # A log file of $past $nouns; shows the last $n lines.
    class ${Noun}LogFile:
    ====
        """Writes a line for each $past $noun."""

        def __init__(self, path):
            self.path = path

        def write(self, $noun):
            """Add one line at the end."""
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"$past {$noun}\\n")

        def read(self):
            """Return all lines of the log."""
            text = self.path.read_text()
            return text.splitlines()

        def last(self, count=$n):
            """Show the newest lines only."""
            if count < 1:
                raise ValueError(f"bad count: {count}")
            return self.read()[-count:]
    ''',
    )


def batch_generator(s: Slots) -> Document:
    """Generator: batches."""
    return _fill(
        s,
        '''
    # Yield $nouns in batches of $n.
    def batches($nouns, size=$n):
    ====
        """Yield lists of at most size $nouns."""
        if size < 1:
            raise ValueError(f"bad size: {size}")
        batch = []
        for $noun in $nouns:
            batch.append($noun)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


    def count_batches($nouns, size=$n):
        """Return the number of batches of $nouns."""
        count = 0
        for batch in batches($nouns, size):
            count += 1
        return count
    ''',
    )


def iterator_class(s: Slots) -> Document:
    """Iterator: class with a position."""
    return _fill(
        s,
        '''
    # An iterator over the $nouns with a given $field.
    class ${Noun}Iterator:
    ====
        """Goes through the $nouns with one $field."""

        def __init__(self, $nouns, $field):
            self.$nouns = list($nouns)
            self.$field = $field
            self.index = 0

        def __iter__(self):
            return self

        def __next__(self):
            while self.index < len(self.$nouns):
                $noun = self.$nouns[self.index]
                self.index += 1
                if $noun.$field == self.$field:
                    return $noun
            raise StopIteration

        def reset(self):
            """Go back to the first $noun."""
            self.index = 0
    ''',
    )


def window_generator(s: Slots) -> Document:
    """Generator: windows."""
    return _fill(
        s,
        '''
    # Yield windows of $k neighbouring $nouns, and the average $num of each.
    def windows($nouns, size=$k):
    ====
        """Yield lists of size neighbouring $nouns."""
        if size < 1:
            raise ValueError(f"bad size: {size}")
        window = []
        for $noun in $nouns:
            window.append($noun)
            if len(window) > size:
                window.pop(0)
            if len(window) == size:
                yield list(window)


    def moving_average($nouns, size=$k):
        """Yield the average $num of each window."""
        for window in windows($nouns, size):
            yield sum($noun["$num"] for $noun in window) / size
    ''',
    )


def page_generator(s: Slots) -> Document:
    """Generator: pages from a loader."""
    return _fill(
        s,
        '''
    # Yield $nouns from pages of $n, loaded one after the other.
    PAGE_SIZE = $n


    def all_$nouns(load_page):
    ====
        """Yield the $nouns of all pages."""
        page = 0
        while True:
            $nouns = load_page(page)
            yield from $nouns
            if len($nouns) < PAGE_SIZE:
                break
            page += 1


    def first_$nouns(load_page, count):
        """Return the first $nouns of all pages."""
        if count < 1:
            raise ValueError(f"bad count: {count}")
        result = []
        for $noun in all_$nouns(load_page):
            result.append($noun)
            if len(result) == count:
                break
        return result
    ''',
    )


def open_manager(s: Slots) -> Document:
    """Context manager: open and close."""
    return _fill(
        s,
        '''
    # A $holder of $nouns that is open only inside a with block.
    class Open$Holder:
    ====
        """Opens the $holder and closes it at the end."""

        def __init__(self, $nouns):
            self.$nouns = $nouns
            self.is_open = False

        def __enter__(self):
            if self.is_open:
                raise ValueError("the $holder is already open")
            self.is_open = True
            return self

        def __exit__(self, kind, error, trace):
            self.is_open = False
            return False

        def take(self):
            """Remove and return the last $noun."""
            if not self.is_open:
                raise ValueError("the $holder is closed")
            return self.$nouns.pop()
    ''',
    )


def setting_manager(s: Slots) -> Document:
    """Context manager: temporary setting."""
    return _fill(
        s,
        '''
    # Change the $field of a $noun for the length of a with block.
    from contextlib import contextmanager


    @contextmanager
    def temporary_$field($noun, $field):
    ====
        """Give the $noun another $field, then the one before."""
        before = $noun.$field
        $noun.$field = $field
        try:
            yield $noun
        finally:
            $noun.$field = before


    def call_with_$field($nouns, $field, function):
        """Return the results of a function for each $noun with another $field."""
        results = []
        for $noun in $nouns:
            with temporary_$field($noun, $field):
                results.append(function($noun))
        return results
    ''',
    )


def rollback_manager(s: Slots) -> Document:
    """Context manager: roll back after an error."""
    return _fill(
        s,
        '''
    # A change of $nouns that is undone if there is an error.
    class ${Noun}Change:
    ====
        """Restores the $nouns after an error."""

        def __init__(self, $nouns):
            self.current = $nouns
            self.before = None

        def __enter__(self):
            self.before = dict(self.current)
            return self

        def __exit__(self, kind, error, trace):
            if kind is not None:
                self.current.clear()
                self.current.update(self.before)
            return False

        def set(self, name, $noun):
            """Change one of the $nouns."""
            if name not in self.current:
                raise ValueError(f"unknown $noun: {name}")
            self.current[name] = $noun
    ''',
    )


def count_decorator(s: Slots) -> Document:
    """Decorator: count calls."""
    return _fill(
        s,
        '''
    # A decorator that counts the $nouns a function is called with.
    # Used by $verb, which marks a $noun as $past.
    import functools


    def count_$nouns(function):
    ====
        """Count the $nouns a function is called with."""

        @functools.wraps(function)
        def wrapper($noun, *args, **kwargs):
            wrapper.count += 1
            return function($noun, *args, **kwargs)

        wrapper.count = 0
        return wrapper


    @count_$nouns
    def $verb($noun):
        """Return the $noun after it is $past."""
        $noun["$past"] = True
        return $noun


    def ${verb}_all($nouns):
        """Return the number of $past $nouns."""
        for $noun in $nouns:
            $verb($noun)
        return $verb.count
    ''',
    )


def require_decorator(s: Slots) -> Document:
    """Decorator: required value."""
    return _fill(
        s,
        '''
    # A decorator for functions of a $noun that checks that it has a $field.
    # Used by set_$extra.
    import functools


    def require_$field(function):
    ====
        """Raise an error if the $noun has no $field."""

        @functools.wraps(function)
        def wrapper($noun, *args, **kwargs):
            if not $noun.get("$field"):
                raise ValueError("the $noun has no $field")
            return function($noun, *args, **kwargs)

        return wrapper


    @require_$field
    def set_$extra($noun, $extra):
        """Change the $extra of the $noun."""
        before = $noun.get("$extra")
        $noun["$extra"] = $extra
        return before
    ''',
    )


def retry_decorator(s: Slots) -> Document:
    """Retry: try a function several times."""
    return _fill(
        s,
        '''
    # A decorator that tries to load a $noun up to $n times, $k seconds apart.
    import functools
    import time


    def retry(function, times=$n, pause=$k):
    ====
        """Call the function again after an error."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            for attempt in range(1, times + 1):
                try:
                    return function(*args, **kwargs)
                except OSError:
                    if attempt == times:
                        raise
                    time.sleep(pause)

        return wrapper


    @retry
    def load_$noun(path):
        """Return the text of the $noun."""
        with open(path, encoding="utf-8") as file:
            return file.read()
    ''',
    )


def memo_decorator(s: Slots) -> Document:
    """Decorator: remember results."""
    return _fill(
        s,
        '''
    # A decorator that remembers the $num of each $noun by its $field.
    import functools


    def remember_$num(function):
    ====
        """Call the function once for each $field."""
        known = {}

        @functools.wraps(function)
        def wrapper($noun):
            $field = $noun["$field"]
            if $field not in known:
                known[$field] = function($noun)
            return known[$field]

        wrapper.forget = known.clear
        return wrapper


    @remember_$num
    def get_$num($noun):
        """Return the $num of the $noun."""
        if "$num" not in $noun:
            raise ValueError("missing value: $num")
        return $noun["$num"]
    ''',
    )


def timer_class(s: Slots) -> Document:
    """Timer: seconds per name."""
    return _fill(
        s,
        '''
    # Measures the seconds it takes to $verb each $noun; slow means above $n.
    import time


    class ${Noun}Timer:
    ====
        """Keeps the seconds of each $noun."""

        limit = $n

        def __init__(self):
            self.seconds = {}

        def $verb(self, name, function):
            """Call the function and keep the seconds it took."""
            start = time.perf_counter()
            try:
                return function(name)
            finally:
                self.seconds[name] = time.perf_counter() - start

        def slow(self):
            """Return the names of the slow $nouns."""
            return [name for name, seconds in self.seconds.items() if seconds > self.limit]

        def total(self):
            """Return the seconds of all $nouns."""
            return sum(self.seconds.values())
    ''',
    )


def error_classes(s: Slots) -> Document:
    """Errors: classes with a base."""
    return _fill(
        s,
        '''
    # Errors for $nouns: unknown $field, and $num above $m.
    class ${Noun}Error(Exception):
    ====
        """An error with a $noun."""

        def __init__(self, $noun, reason):
            super().__init__(f"{reason}: {$noun}")
            self.reason = reason


    class Unknown$Field(${Noun}Error):
        """There is no such $field."""


    class Bad$Num(ValueError):
        """The $num is too high."""


    def check_$noun(item, known):
        """Raise an error if something is wrong."""
        if item["$field"] not in known:
            raise Unknown$Field(item, "unknown $field")
        limit = $m
        if item["$num"] > limit:
            raise Bad$Num(f"above {limit}")
    ''',
    )


def error_list(s: Slots) -> Document:
    """Errors: validation with a list of messages."""
    return _fill(
        s,
        '''
    # Check a $noun with the values $field, $extra and $num, and collect all errors.
    REQUIRED = ("$field", "$extra", "$num")


    class Invalid$Noun(ValueError):
    ====
        """The $noun has errors."""

        def __init__(self, errors):
            super().__init__("; ".join(errors))
            self.errors = errors


    def find_errors($noun):
        """Return the errors of the $noun."""
        errors = []
        for name in REQUIRED:
            if name not in $noun:
                errors.append(f"missing value: {name}")
        if $noun.get("$num", 0) < 0:
            errors.append("negative $num")
        return errors


    def check_$noun($noun):
        """Raise an error if the $noun is not valid."""
        errors = find_errors($noun)
        if errors:
            raise Invalid$Noun(errors)
    ''',
    )


def test_of_store(s: Slots) -> Document:
    """Unit test: store."""
    return _fill(
        s,
        """
    # Tests of a store of $nouns, with $name and $friend.
    import unittest

    from ${noun}_store import ${Noun}Store


    class Test${Noun}Store(unittest.TestCase):
    ====
        def setUp(self):
            self.store = ${Noun}Store()
            self.store.add_$noun("$name", 1)

        def test_get(self):
            found = self.store.get_$noun("$name")
            self.assertEqual(found, 1)

        def test_removal(self):
            other = ${Noun}Store()
            other.add_$noun("$friend", 2)
            assert other.remove_$noun("$friend") == 2
            assert len(other) == 0

        def test_unknown(self):
            with self.assertRaises(ValueError):
                self.store.get_$noun("nobody")


    if __name__ == "__main__":
        unittest.main()
    """,
    )


def test_of_filter(s: Slots) -> Document:
    """Unit test: functions over a list."""
    return _fill(
        s,
        """
    # Tests of the functions find_$noun and filter_by_$field.
    import unittest

    from $nouns import filter_by_$field, find_$noun

    FIRST = {"name": "$name", "$field": "$state"}
    SECOND = {"name": "$friend", "$field": "$state2"}


    class Test${Nouns}(unittest.TestCase):
    ====
        def setUp(self):
            self.$nouns = [FIRST, SECOND]

        def test_filter_first(self):
            result = filter_by_$field(self.$nouns, "$state")
            self.assertEqual(result, [FIRST])

        def test_find(self):
            both = [SECOND, FIRST]
            assert find_$noun(both, "$friend") is SECOND

        def test_errors(self):
            with self.assertRaises(ValueError):
                find_$noun([], "$name")


    if __name__ == "__main__":
        unittest.main()
    """,
    )


def test_of_range(s: Slots) -> Document:
    """Unit test: clamp and errors."""
    return _fill(
        s,
        """
    # Tests of clamp_$num and check_$num with a $num from $n to $m.
    import unittest

    from $nouns import check_$num, clamp_$num


    class Test${Num}(unittest.TestCase):
    ====
        def test_too_low(self):
            self.assertEqual(clamp_$num(0, $n, $m), $n)

        def test_too_high(self):
            result = clamp_$num(1000, $n, $m)
            assert result == $m, "$num is not clamped"

        def test_allowed(self):
            for value in range($n, $m):
                check_$num(value)

        def test_errors(self):
            with self.assertRaises(ValueError) as caught:
                check_$num(-1)
            self.assertIn("$num", str(caught.exception))


    if __name__ == "__main__":
        unittest.main()
    """,
    )


def script_filter(s: Slots) -> Document:
    """Script: filter a json file."""
    return _fill(
        s,
        '''
    # Print the $nouns in a json file, filtered by $field, at most $n.
    import argparse
    import json


    def main():
    ====
        """Read the arguments and print the $nouns."""
        parser = argparse.ArgumentParser(description="Print $nouns.")
        parser.add_argument("path", help="json file with $nouns")
        parser.add_argument("--$field", help="only $nouns with this $field")
        parser.add_argument("--limit", type=int, default=$n, help="number of $nouns")
        args = parser.parse_args()
        with open(args.path, encoding="utf-8") as file:
            $nouns = json.load(file)
        if args.$field:
            $nouns = [$noun for $noun in $nouns if $noun["$field"] == args.$field]
        for $noun in $nouns[: args.limit]:
            print($noun)


    if __name__ == "__main__":
        main()
    ''',
    )


def script_commands(s: Slots) -> Document:
    """Script: two commands."""
    return _fill(
        s,
        '''
    # A script with the commands $verb and $verb2 for $nouns ($past, $past2).
    import argparse


    def $verb(name):
    ====
        """Print that the $noun was $past."""
        print(f"$past $noun {name}")


    def $verb2(name):
        """Print that the $noun was $past2."""
        print(f"$past2 $noun {name}")


    COMMANDS = {"$verb": $verb, "$verb2": $verb2}


    def main():
        """Read the arguments and run the command."""
        parser = argparse.ArgumentParser(description="Work with $nouns.")
        parser.add_argument("command", choices=sorted(COMMANDS))
        parser.add_argument("names", nargs="+", help="names of $nouns")
        args = parser.parse_args()
        for name in args.names:
            COMMANDS[args.command](name)


    if __name__ == "__main__":
        main()
    ''',
    )


def script_total(s: Slots) -> Document:
    """Script: total of a csv column."""
    return _fill(
        s,
        '''
    # Print the total $num of the $nouns in a csv file by $field.
    import argparse
    import csv


    def total_by_$field(rows):
    ====
        """Return the total $num of each $field."""
        totals = {}
        for row in rows:
            $field = row["$field"]
            totals[$field] = totals.get($field, 0) + float(row["$num"])
        return totals


    def main():
        """Read the arguments and print the totals."""
        parser = argparse.ArgumentParser(description="Print the total $num.")
        parser.add_argument("path", help="csv file with $nouns")
        args = parser.parse_args()
        with open(args.path, newline="", encoding="utf-8") as file:
            totals = total_by_$field(csv.DictReader(file))
        for $field in sorted(totals):
            print(f"{$field}: {totals[$field]}")


    if __name__ == "__main__":
        main()
    ''',
    )


def state_table(s: Slots) -> Document:
    """State machine: table of next states."""
    return _fill(
        s,
        '''
    # The state of a $noun: from $state to $state2, from $state2 to $state3.
    class ${Noun}State:
    ====
        """Keeps the state of a $noun."""

        steps = {"$state": ["$state2"], "$state2": ["$state3"], "$state3": []}

        def __init__(self):
            self.state = "$state"

        def can_go(self, state):
            """Return whether the $noun can go to the state."""
            return state in self.steps[self.state]

        def go(self, state):
            """Go to the given state."""
            if state not in self.steps:
                raise ValueError(f"unknown state: {state}")
            if not self.can_go(state):
                raise ValueError(f"no step from {self.state} to {state}")
            self.state = state

        def is_final(self):
            """Return whether there is no next state."""
            return not self.steps[self.state]
    ''',
    )


def state_methods(s: Slots) -> Document:
    """State machine: one method per step."""
    return _fill(
        s,
        '''
    # A $noun that is $state at first; $verb makes it $state2, $verb2 makes it $state3.
    class $Noun:
    ====
        """A $noun with a state."""

        def __init__(self, name):
            self.name = name
            self.state = "$state"

        def expect(self, state):
            """Raise an error if the $noun has another state."""
            if self.state != state:
                raise ValueError(f"$noun {self.name} is {self.state}, not {state}")

        def $verb(self):
            """Go from $state to $state2."""
            self.expect("$state")
            self.state = "$state2"

        def $verb2(self):
            """Go from $state2 to $state3."""
            self.expect("$state2")
            self.state = "$state3"

        def __str__(self):
            return f"{self.name} ({self.state})"
    ''',
    )


def state_cycle(s: Slots) -> Document:
    """State machine: states in a circle."""
    return _fill(
        s,
        '''
    # A $noun that goes through the states $state, $state2 and $state3 in a circle.
    STATES = ("$state", "$state2", "$state3")


    class ${Noun}Cycle:
    ====
        """Goes through the states of a $noun."""

        def __init__(self):
            self.index = 0
            self.rounds = 0

        @property
        def state(self):
            """Return the state of the $noun."""
            return STATES[self.index]

        def advance(self):
            """Go to the next state and return it."""
            self.index += 1
            if self.index == len(STATES):
                self.index = 0
                self.rounds += 1
            return self.state

        def advance_to(self, state):
            """Go on until the $noun has the given state."""
            if state not in STATES:
                raise ValueError(f"unknown state: {state}")
            while self.state != state:
                self.advance()
    ''',
    )


def event_emitter(s: Slots) -> Document:
    """Events: handlers by event."""
    return _fill(
        s,
        '''
    # Calls handlers when a $noun is $past or $past2.
    class ${Noun}Events:
    ====
        """Keeps handlers for the events of $nouns."""

        def __init__(self):
            self.handlers = {"$past": [], "$past2": []}

        def on(self, event, handler):
            """Call the handler at each event."""
            if event not in self.handlers:
                raise ValueError(f"unknown event: {event}")
            self.handlers[event].append(handler)

        def off(self, event, handler):
            """Remove the handler of the event."""
            self.handlers[event].remove(handler)

        def $past(self, $noun):
            """Call the handlers of each $past $noun."""
            for handler in self.handlers["$past"]:
                handler($noun)

        def $past2(self, $noun):
            """Call the handlers of each $past2 $noun."""
            for handler in self.handlers["$past2"]:
                handler($noun)
    ''',
    )


def event_watcher(s: Slots) -> Document:
    """Events: watch one value."""
    return _fill(
        s,
        '''
    # A $noun that tells its watchers when its $num changes.
    class Watched$Noun:
    ====
        """Tells watchers about each new $num."""

        def __init__(self, $num=0):
            self._$num = $num
            self.watchers = []

        def watch(self, watcher):
            """Call the watcher at each new $num."""
            if watcher in self.watchers:
                raise ValueError("watcher already added")
            self.watchers.append(watcher)

        @property
        def $num(self):
            """Return the $num of the $noun."""
            return self._$num

        @$num.setter
        def $num(self, $num):
            before = self._$num
            if $num == before:
                return
            self._$num = $num
            for watcher in self.watchers:
                watcher(before, $num)
    ''',
    )


def tree_node(s: Slots) -> Document:
    """Tree: node with children."""
    return _fill(
        s,
        '''
    # A tree of $nouns: each $noun has a $num and other $nouns below it.
    class ${Noun}Node:
    ====
        """A $noun and the $nouns below it."""

        def __init__(self, name, $num=0):
            self.name = name
            self.$num = $num
            self.children = []

        def add(self, child):
            """Add a $noun below this one and return it."""
            self.children.append(child)
            return child

        def total_$num(self):
            """Return the total $num of this $noun and all below."""
            return self.$num + sum(child.total_$num() for child in self.children)

        def find(self, name):
            """Return the $noun with the given name, or None."""
            if self.name == name:
                return self
            for child in self.children:
                found = child.find(name)
                if found is not None:
                    return found
            return None
    ''',
    )


def linked_list(s: Slots) -> Document:
    """Linked list."""
    return _fill(
        s,
        '''
    # A linked list of $nouns.
    class ${Noun}Node:
    ====
        """One $noun and the next."""

        def __init__(self, $noun, following=None):
            self.$noun = $noun
            self.following = following


    class ${Noun}List:
        """Keeps $nouns in a linked list."""

        def __init__(self):
            self.head = None
            self.length = 0

        def add_$noun(self, $noun):
            """Add a $noun at the front."""
            self.head = ${Noun}Node($noun, self.head)
            self.length += 1

        def __len__(self):
            return self.length

        def __iter__(self):
            node = self.head
            while node is not None:
                yield node.$noun
                node = node.following
    ''',
    )


def search_tree(s: Slots) -> Document:
    """Tree: binary search tree."""
    return _fill(
        s,
        '''
    # A search tree of $nouns, sorted by $num.
    class ${Noun}Tree:
    ====
        """A $noun with lower $nouns left and higher $nouns right."""

        def __init__(self, $noun):
            self.$noun = $noun
            self.left = None
            self.right = None

        def add(self, $noun):
            """Add a $noun at its place."""
            side = "left" if $noun.$num < self.$noun.$num else "right"
            child = getattr(self, side)
            if child is None:
                setattr(self, side, ${Noun}Tree($noun))
            else:
                child.add($noun)

        def __iter__(self):
            if self.left is not None:
                yield from self.left
            yield self.$noun
            if self.right is not None:
                yield from self.right
    ''',
    )


def grid_map(s: Slots) -> Document:
    """Grid: places of objects."""
    return _fill(
        s,
        '''
    # A grid with $n rows and $m columns; each cell holds one $noun or None.
    class ${Noun}Grid:
    ====
        """Keeps $nouns in $n rows and $m columns."""

        rows = $n
        columns = $m

        def __init__(self):
            self.cells = [[None] * self.columns for row in range(self.rows)]

        def check(self, row, column):
            """Raise an error if the cell is outside the grid."""
            if not (0 <= row < self.rows and 0 <= column < self.columns):
                raise ValueError(f"bad cell: {row}, {column}")

        def put(self, row, column, $noun):
            """Put a $noun into the cell."""
            self.check(row, column)
            self.cells[row][column] = $noun

        def get(self, row, column):
            """Return the $noun in the cell."""
            self.check(row, column)
            return self.cells[row][column]
    ''',
    )


def matrix_sums(s: Slots) -> Document:
    """Matrix: sums and transpose."""
    return _fill(
        s,
        '''
    # A matrix of $num: one row for each $noun, one column for each $part.
    def ${noun}_totals(matrix):
    ====
        """Return the total $num of each $noun."""
        return [sum(row) for row in matrix]


    def transpose(rows):
        """Swap the two directions of a matrix."""
        return [list(column) for column in zip(*rows)]


    def ${part}_totals(matrix):
        """Add up all columns, one per $part."""
        columns = transpose(matrix)
        return list(map(sum, columns))


    def check_matrix(matrix):
        """Raise an error if lengths differ."""
        width = len(matrix[0])
        for row in matrix:
            if len(row) != width:
                raise ValueError(f"bad row: {row}")
    ''',
    )


def grid_walk(s: Slots) -> Document:
    """Grid: position that moves."""
    return _fill(
        s,
        '''
    # A $noun that moves on a grid of $n by $m cells.
    MOVES = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}


    class Moving$Noun:
    ====
        """A $noun with a position on the grid."""

        width = $n
        height = $m

        def __init__(self):
            self.x = 0
            self.y = 0

        def move(self, name):
            """Move the $noun by one cell."""
            if name not in MOVES:
                raise ValueError(f"unknown move: {name}")
            dx, dy = MOVES[name]
            self.x = max(0, min(self.x + dx, self.width - 1))
            self.y = max(0, min(self.y + dy, self.height - 1))

        def walk(self, names):
            """Make all moves and return the position."""
            for name in names:
                self.move(name)
            return self.x, self.y
    ''',
    )


TEMPLATES: tuple[Template, ...] = (
    dict_store,
    list_queue,
    bounded_stack,
    handler_registry,
    limited_cache,
    field_counter,
    stock_inventory,
    unique_set,
    undo_history,
    limited_holder,
    grouped_store,
    data_record,
    data_line,
    data_parent,
    data_range,
    data_convert,
    convert_nested,
    filter_dicts,
    group_dicts,
    sort_dicts,
    sum_dicts,
    find_dicts,
    count_dicts,
    extreme_dicts,
    unique_dicts,
    join_dicts,
    parse_pairs,
    format_lines,
    validate_code,
    make_slug,
    count_words,
    parse_record,
    average_values,
    clamp_values,
    running_total,
    convert_units,
    bracket_table,
    json_file,
    csv_file,
    line_file,
    log_file,
    batch_generator,
    iterator_class,
    window_generator,
    page_generator,
    open_manager,
    setting_manager,
    rollback_manager,
    count_decorator,
    require_decorator,
    retry_decorator,
    memo_decorator,
    timer_class,
    error_classes,
    error_list,
    test_of_store,
    test_of_filter,
    test_of_range,
    script_filter,
    script_commands,
    script_total,
    state_table,
    state_methods,
    state_cycle,
    event_emitter,
    event_watcher,
    tree_node,
    linked_list,
    search_tree,
    grid_map,
    matrix_sums,
    grid_walk,
)

HELD_OUT: frozenset[str] = frozenset(
    {
        "handler_registry",
        "stock_inventory",
        "data_range",
        "group_dicts",
        "extreme_dicts",
        "parse_record",
        "running_total",
        "csv_file",
        "window_generator",
        "rollback_manager",
        "script_total",
        "state_cycle",
    }
)
