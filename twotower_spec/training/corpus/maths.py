"""Word problems with answers worked out step by step."""

from __future__ import annotations

from twotower_spec.training.corpus.slots import Document, Slots, Template


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs of a singular and its plural."""
    return tuple((one, many) for one, many in (pair.split() for pair in text.split(", ")))


NAMES = _words(
    "Mia Omar Lena Kofi Yuki Ivan Priya Diego Anna Ravi Sara Chen Nora Ali Eva Juan Aiko Finn Zara Leo Ines Tariq "
    "Maya Hugo Wei Rosa Sven Amina Pablo Greta Kenji Lucia Emil Fatima Noah Olga Samir Tess Bruno Hana Igor Jada Luca "
    "Mei Nils Paula Dara Rita Tomas Uma Viktor Wanda Yusuf Zoe Abel Clara Farid Gita Jonas Keiko"
)
THINGS = _words(
    "pencils marbles stickers coins buttons shells beads cards stamps crayons candies balloons books keys ribbons "
    "blocks stones feathers badges magnets notebooks erasers toys dolls puzzles postcards rings nuts pins bottles "
    "candles brushes bells kites photos whistles tokens medals flags spoons"
)
CONTAINERS = _pairs(
    "box boxes, bag bags, jar jars, basket baskets, drawer drawers, tin tins, bucket buckets, case cases, "
    "pouch pouches, tray trays, bowl bowls, crate crates, packet packets, chest chests, sack sacks, cup cups, "
    "barrel barrels, carton cartons, pot pots, bin bins"
)
GOODS = _pairs(
    "pen pens, hat hats, scarf scarves, mug mugs, lamp lamps, towel towels, ball balls, plate plates, belt belts, "
    "shirt shirts, mask masks, brush brushes, map maps, rope ropes, clock clocks"
)
PLACES = tuple(
    f"the {place}"
    for place in _words(
        "library market museum bakery school park harbor station farm theater hospital hotel zoo castle mill lake "
        "bridge airport stadium beach"
    )
)
ANIMALS = _words("cows goats sheep ducks hens horses geese pigs rabbits ponies donkeys turkeys llamas camels pigeons")
CROPS = _words("tomato carrot onion bean pepper cabbage lettuce pumpkin potato corn cucumber melon radish spinach leek")
FRUITS = _words("apples pears plums peaches lemons oranges cherries figs mangoes limes apricots dates kiwis olives")
BAKED = _words("cookies muffins buns rolls pies tarts scones pretzels waffles biscuits cupcakes bagels")
DRINKS = _words("lemonade tea juice milk water coffee cocoa soda cider punch")
SPORTS = _words("football hockey handball rugby volleyball basketball cricket tennis polo curling")
VEHICLES = _words("bus train van ferry tram boat coach plane truck shuttle")
TREATS = _pairs(
    "cake cakes, pizza pizzas, pie pies, loaf loaves, tart tarts, melon melons, cheese cheeses, pudding puddings, "
    "quiche quiches, flan flans"
)
COLORS = _words("red blue green yellow white black brown pink purple gray silver gold")
GROUNDS = _words("garden field yard room hall park meadow court terrace playground")

# Words of the steps, each other than the last one's: a text that says the same over and over is drafted too easily.
NUMBERS = ("one", "two", "three", "four")
CONJUNCTIONS = ("so", "thus", "therefore", "hence")

# A sentence of the question, a calculation (number, operator, number) and what its result # means.
Step = tuple[str, int, str, int, str]


def _solve(steps: list[Step], ask: str, unit: str, story: str = "") -> Document:
    """A problem whose story is the sentences of its steps, unless told in another order."""
    story = story or " ".join(dict.fromkeys(step[0] for step in steps))
    completion, result = " Let's work it out step by step.\n", 0
    for number, so, (sentence, a, op, b, conclusion) in zip(NUMBERS, CONJUNCTIONS, steps, strict=False):
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        concluded = conclusion.replace("#", str(result))
        completion += f"Step {number}: {sentence} {a} {op} {b} = {result}, {so} {concluded}.\n"
    return Document(f"Question: {story} {ask}\nAnswer:", f"{completion}The answer is {result} {unit}.\n")


def _part(s: Slots, total: int) -> int:
    """What can be taken from a total so that at least 2 are left."""
    return s.number(2, min(20, total - 2))


def boxes_given_away(s: Slots) -> Document:
    (name, friend), thing, (box, boxes) = s.pick_distinct(NAMES, 2), s.pick(THINGS), s.pick(CONTAINERS)
    count, each = s.number(2, 12), s.number(2, 12)
    given = _part(s, count * each)
    has = f"{name} has {count} {boxes} with {each} {thing} in each {box}."
    gift = f"{name} gives {given} {thing} to {friend}."
    steps = [
        (has, count, "*", each, f"{name} has # {thing} in all"),
        (gift, count * each, "-", given, f"{name} has # {thing} left"),
    ]
    return _solve(steps, f"How many {thing} does {name} have left?", thing)


def boxes_and_loose(s: Slots) -> Document:
    name, thing, (box, boxes) = s.pick(NAMES), s.pick(THINGS), s.pick(CONTAINERS)
    count, each, loose = s.number(2, 12), s.number(2, 12), s.number(2, 12)
    has = f"{name} fills {count} {boxes} and puts {each} {thing} in each {box}."
    more = f"{name} also has {loose} loose {thing}."
    steps = [
        (has, count, "*", each, f"there are # {thing} in the {boxes}"),
        (more, count * each, "+", loose, f"{name} has # {thing} in all"),
    ]
    return _solve(steps, f"How many {thing} does {name} have in all?", thing)


def two_kinds_of_containers(s: Slots) -> Document:
    name, thing, kinds = s.pick(NAMES), s.pick(THINGS), s.pick_distinct(CONTAINERS, 2)
    (box, boxes), (bag, bags) = kinds
    a, b, c, d = (s.number(2, 9) for _ in range(4))
    steps = [
        (f"{name} packs {a} {boxes} with {b} {thing} in each {box}.", a, "*", b, f"there are # {thing} in the {boxes}"),
        (f"{name} packs {c} {bags} with {d} {thing} in each {bag}.", c, "*", d, f"there are # {thing} in the {bags}"),
        (f"{name} counts all the {thing}.", a * b, "+", c * d, f"there are # {thing} in all"),
    ]
    return _solve(steps, f"How many {thing} are there in all?", thing)


def containers_shared(s: Slots) -> Document:
    name, thing, (box, boxes) = s.pick(NAMES), s.pick(THINGS), s.pick(CONTAINERS)
    friends, count, share = s.number(2, 5), s.number(2, 9), s.number(2, 4)
    each = friends * share
    has = f"{name} has {count} {boxes} with {each} {thing} in each {box}."
    shares = f"{name} shares all the {thing} equally among {friends} friends."
    steps = [
        (has, count, "*", each, f"{name} has # {thing} in all"),
        (shares, count * each, "/", friends, f"each friend gets # {thing}"),
    ]
    return _solve(steps, f"How many {thing} does each friend get?", thing)


def some_containers_empty(s: Slots) -> Document:
    thing, (box, boxes), place = s.pick(THINGS), s.pick(CONTAINERS), s.pick(PLACES)
    count, each = s.number(4, 12), s.number(2, 12)
    empty = _part(s, count)
    steps = [
        (f"At {place} there are {count} {boxes}, and {empty} are empty.", count, "-", empty, f"# {boxes} are full"),
        (f"Each full {box} holds {each} {thing}.", count - empty, "*", each, f"there are # {thing} in all"),
    ]
    return _solve(steps, f"How many {thing} are there in all?", thing)


def packing_into_containers(s: Slots) -> Document:
    name, thing, color, (box, boxes) = s.pick(NAMES), s.pick(THINGS), s.pick(COLORS), s.pick(CONTAINERS)
    each, needed = s.number(2, 9), s.number(2, 4)
    plain = s.number(max(2, each * needed - 18), min(20, each * needed - 2))
    colored = each * needed - plain
    first = f"{name} has {plain} plain {thing} and {colored} {color} {thing}."
    steps = [
        (first, plain, "+", colored, f"{name} has # {thing} in all"),
        (f"{name} packs {each} {thing} into each {box}.", each * needed, "/", each, f"{name} needs # {boxes}"),
    ]
    return _solve(steps, f"How many {boxes} does {name} need?", boxes)


def containers_lost_and_found(s: Slots) -> Document:
    name, thing, (_, boxes) = s.pick(NAMES), s.pick(THINGS), s.pick(CONTAINERS)
    count, each, found = s.number(2, 12), s.number(2, 12), s.number(2, 12)
    lost = _part(s, count * each)
    has = f"{name} keeps {each} {thing} in each of {count} {boxes}."
    steps = [
        (has, count, "*", each, f"{name} has # {thing} in all"),
        (f"{name} loses {lost} {thing}.", count * each, "-", lost, f"{name} has # {thing} left"),
        (f"Then {name} finds {found} {thing}.", count * each - lost, "+", found, f"{name} has # {thing} now"),
    ]
    return _solve(steps, f"How many {thing} does {name} have now?", thing)


def gets_and_gives(s: Slots) -> Document:
    (name, friend), thing = s.pick_distinct(NAMES, 2), s.pick(THINGS)
    has, gets = s.number(2, 12), s.number(2, 12)
    given = _part(s, has + gets)
    steps = [
        (f"{name} has {has} {thing} and gets {gets} more {thing}.", has, "+", gets, f"{name} has # {thing} in all"),
        (f"{name} gives {given} {thing} to {friend}.", has + gets, "-", given, f"{name} has # {thing} left"),
    ]
    return _solve(steps, f"How many {thing} does {name} have left?", thing)


def more_than_a_friend(s: Slots) -> Document:
    (name, friend), thing = s.pick_distinct(NAMES, 2), s.pick(THINGS)
    has, more = s.number(2, 12), s.number(2, 12)
    steps = [
        (f"{friend} has {more} more {thing} than {name}.", has, "+", more, f"{friend} has # {thing}"),
        (f"{name} has {has} {thing}.", has + more, "+", has, f"{name} and {friend} have # {thing} in all"),
    ]
    story = f"{name} has {has} {thing}. {friend} has {more} more {thing} than {name}."
    return _solve(steps, f"How many {thing} do {name} and {friend} have in all?", thing, story)


def fewer_than_a_friend(s: Slots) -> Document:
    (name, friend), thing = s.pick_distinct(NAMES, 2), s.pick(THINGS)
    has = s.number(4, 12)
    fewer = _part(s, has)
    steps = [
        (f"{friend} has {fewer} fewer {thing} than {name}.", has, "-", fewer, f"{friend} has # {thing}"),
        (f"{name} has {has} {thing}.", has - fewer, "+", has, f"{name} and {friend} have # {thing} in all"),
    ]
    story = f"{name} has {has} {thing}. {friend} has {fewer} fewer {thing} than {name}."
    return _solve(steps, f"How many {thing} do {name} and {friend} have in all?", thing, story)


def times_as_many(s: Slots) -> Document:
    (name, friend), thing = s.pick_distinct(NAMES, 2), s.pick(THINGS)
    has, times = s.number(2, 12), s.number(2, 9)
    steps = [
        (f"{friend} has {times} times as many {thing} as {name}.", has, "*", times, f"{friend} has # {thing}"),
        (f"{name} has {has} {thing}.", has * times, "+", has, f"{name} and {friend} have # {thing} in all"),
    ]
    story = f"{name} has {has} {thing}. {friend} has {times} times as many {thing} as {name}."
    return _solve(steps, f"How many {thing} do {name} and {friend} have in all?", thing, story)


def doubled_collection(s: Slots) -> Document:
    name, thing = s.pick(NAMES), s.pick(THINGS)
    has, more = s.number(2, 12), s.number(2, 12)
    first = f"{name} collects {has} {thing} in spring and twice as many in summer."
    then = f"In autumn {name} collects {more} {thing} more than in summer."
    steps = [
        (first, has, "*", 2, f"{name} collects # {thing} in summer"),
        (then, has * 2, "+", more, f"{name} collects # {thing} in autumn"),
    ]
    return _solve(steps, f"How many {thing} does {name} collect in autumn?", thing)


def three_friends_compare(s: Slots) -> Document:
    (name, friend, third), thing = s.pick_distinct(NAMES, 3), s.pick(THINGS)
    has, times = s.number(2, 12), s.number(2, 9)
    fewer = _part(s, has * times)
    steps = [
        (f"{friend} has {times} times as many {thing} as {name}.", has, "*", times, f"{friend} has # {thing}"),
        (f"{third} has {fewer} fewer {thing} than {friend}.", has * times, "-", fewer, f"{third} has # {thing}"),
    ]
    story = f"{name} has {has} {thing}. {steps[0][0]} {steps[1][0]}"
    return _solve(steps, f"How many {thing} does {third} have?", thing, story)


def how_many_more(s: Slots) -> Document:
    (name, friend), thing, (box, boxes) = s.pick_distinct(NAMES, 2), s.pick(THINGS), s.pick(CONTAINERS)
    count, each = s.number(2, 12), s.number(2, 12)
    other = _part(s, count * each)
    first = f"{name} has {count} {boxes} of {thing} with {each} in each {box}."
    steps = [
        (first, count, "*", each, f"{name} has # {thing} in all"),
        (f"{friend} has only {other} {thing}.", count * each, "-", other, f"{name} has # {thing} more"),
    ]
    return _solve(steps, f"How many {thing} more than {friend} does {name} have?", thing)


def change_from_shopping(s: Slots) -> Document:
    name, (good, goods) = s.pick(NAMES), s.pick(GOODS)
    price, count = s.number(2, 4), s.number(2, 4)
    money = s.number(price * count + 2, 20)
    first = f"{name} buys {count} {goods} and each {good} costs {price} dollars."
    steps = [
        (first, count, "*", price, f"the {goods} cost # dollars"),
        (f"{name} has {money} dollars.", money, "-", price * count, f"{name} has # dollars left"),
    ]
    return _solve(steps, f"How many dollars does {name} have left?", "dollars", f"{steps[1][0]} {steps[0][0]}")


def two_goods_bought(s: Slots) -> Document:
    name, ((hat, hats), (pen, pens)) = s.pick(NAMES), s.pick_distinct(GOODS, 2)
    a, b, c, d = (s.number(2, 9) for _ in range(4))
    steps = [
        (f"{name} buys {a} {hats} for {b} dollars per {hat}.", a, "*", b, f"the {hats} cost # dollars"),
        (f"{name} buys {c} {pens} for {d} dollars per {pen}.", c, "*", d, f"the {pens} cost # dollars"),
        (f"{name} pays for the {hats} and the {pens}.", a * b, "+", c * d, f"{name} pays # dollars in all"),
    ]
    return _solve(steps, f"How many dollars does {name} pay in all?", "dollars")


def discount_on_total(s: Slots) -> Document:
    name, (_, goods), place = s.pick(NAMES), s.pick(GOODS), s.pick(PLACES)
    count, price = s.number(2, 12), s.number(2, 12)
    off = _part(s, count * price)
    first = f"At {place} {name} picks {count} {goods} at {price} dollars each."
    steps = [
        (first, count, "*", price, f"the {goods} cost # dollars"),
        (f"{name} gets a discount of {off} dollars on the total.", count * price, "-", off, f"{name} pays # dollars"),
    ]
    return _solve(steps, f"How many dollars does {name} pay?", "dollars")


def discount_on_each(s: Slots) -> Document:
    name, (good, goods) = s.pick(NAMES), s.pick(GOODS)
    price, count = s.number(4, 12), s.number(2, 10)
    off = s.number(max(2, price - 18), price - 2)
    first = f"One {good} costs {price} dollars, but today it is {off} dollars cheaper."
    steps = [
        (first, price, "-", off, f"one {good} costs # dollars today"),
        (f"{name} buys {count} {goods} today.", price - off, "*", count, f"{name} pays # dollars"),
    ]
    return _solve(steps, f"How many dollars does {name} pay?", "dollars")


def delivery_fee(s: Slots) -> Document:
    name, (good, goods) = s.pick(NAMES), s.pick(GOODS)
    count, price, fee = s.number(2, 12), s.number(2, 12), s.number(2, 12)
    first = f"{name} orders {count} {goods} and every {good} costs {price} dollars."
    steps = [
        (first, count, "*", price, f"the {goods} cost # dollars"),
        (f"The delivery costs {fee} dollars more.", count * price, "+", fee, f"{name} pays # dollars in all"),
    ]
    return _solve(steps, f"How many dollars does {name} pay in all?", "dollars")


def weekly_saving_and_gift(s: Slots) -> Document:
    name, weeks, each, gift = s.pick(NAMES), s.number(2, 12), s.number(2, 12), s.number(2, 12)
    steps = [
        (f"{name} saves {each} dollars every week for {weeks} weeks.", each, "*", weeks, f"{name} saves # dollars"),
        (f"Then {name} gets {gift} dollars as a gift.", each * weeks, "+", gift, f"{name} has # dollars now"),
    ]
    return _solve(steps, f"How many dollars does {name} have now?", "dollars")


def saving_then_spending(s: Slots) -> Document:
    name, good = s.pick(NAMES), s.pick(GOODS)[0]
    start, months, each = s.number(2, 12), s.number(2, 12), s.number(2, 12)
    saved = start + months * each
    price = _part(s, saved)
    first = f"{name} puts {each} dollars into the bank each month for {months} months."
    steps = [
        (first, each, "*", months, f"{name} saves # dollars"),
        (f"The bank account had {start} dollars at first.", each * months, "+", start, f"{name} has # dollars in all"),
        (f"{name} spends {price} dollars on a new {good}.", saved, "-", price, f"{name} has # dollars left"),
    ]
    story = f"{steps[1][0]} {steps[0][0]} {steps[2][0]}"
    return _solve(steps, f"How many dollars does {name} have left?", "dollars", story)


def weeks_to_a_goal(s: Slots) -> Document:
    name, good = s.pick(NAMES), s.pick(GOODS)[0]
    each, weeks = s.number(2, 4), s.number(2, 4)
    price = s.number(each * weeks + 2, 20)
    has = price - each * weeks
    first = f"{name} wants a {good} for {price} dollars and has {has} dollars."
    steps = [
        (first, price, "-", has, f"{name} still needs # dollars"),
        (f"{name} can save {each} dollars a week.", price - has, "/", each, f"{name} needs # weeks"),
    ]
    return _solve(steps, f"How many weeks does {name} need to save?", "weeks")


def selling_drinks(s: Slots) -> Document:
    name, drink = s.pick(NAMES), s.pick(DRINKS)
    cups, price = s.number(2, 12), s.number(2, 12)
    cost = _part(s, cups * price)
    first = f"{name} sells {cups} cups of {drink} for {price} dollars a cup."
    steps = [
        (first, cups, "*", price, f"{name} earns # dollars"),
        (f"Making the {drink} costs {cost} dollars.", cups * price, "-", cost, f"{name} keeps # dollars"),
    ]
    return _solve(steps, f"How many dollars does {name} keep after paying the cost?", "dollars")


def wages_and_tip(s: Slots) -> Document:
    name, place, hours, pay, tip = s.pick(NAMES), s.pick(PLACES), s.number(2, 12), s.number(2, 12), s.number(2, 12)
    first = f"{name} works at {place} for {hours} hours and earns {pay} dollars an hour."
    steps = [
        (first, hours, "*", pay, f"{name} earns # dollars"),
        (f"{name} also gets a tip of {tip} dollars.", hours * pay, "+", tip, f"{name} has # dollars in all"),
    ]
    return _solve(steps, f"How many dollars does {name} have in all?", "dollars")


def bill_shared(s: Slots) -> Document:
    name, drink, people, share = s.pick(NAMES), s.pick(DRINKS), s.number(3, 5), s.number(2, 6)
    food = s.number(max(2, people * share - 20), min(20, people * share - 2))
    extra = people * share - food
    first = f"The food costs {food} dollars and the {drink} costs {extra} dollars."
    steps = [
        (first, food, "+", extra, "the bill is # dollars"),
        (f"The {people} friends split the bill equally.", people * share, "/", people, "each friend pays # dollars"),
    ]
    story = f"On the birthday of {name} a group goes out to eat. {steps[0][0]} {steps[1][0]}"
    return _solve(steps, "How many dollars does each friend pay?", "dollars", story)


def tickets_for_a_family(s: Slots) -> Document:
    place, adults, children = s.pick(PLACES), s.number(2, 8), s.number(2, 8)
    full, half = s.number(4, 12), s.number(2, 8)
    steps = [
        (f"A group of {adults} adults pay {full} dollars each.", adults, "*", full, "the adults pay # dollars"),
        (f"A group of {children} children pay {half} dollars each.", children, "*", half, "the children pay # dollars"),
        (f"The two groups visit {place}.", adults * full, "+", children * half, "the tickets cost # dollars in all"),
    ]
    return _solve(steps, "How many dollars do the tickets cost in all?", "dollars")


def hours_on_the_road(s: Slots) -> Document:
    (start, end), vehicle = s.pick_distinct(PLACES, 2), s.pick(VEHICLES)
    speed, hours, rest = s.number(2, 12), s.number(2, 12), s.number(2, 12)
    first = f"The {vehicle} goes {speed} miles every hour for {hours} hours."
    steps = [
        (first, speed, "*", hours, f"the {vehicle} goes # miles"),
        (f"Then {end} is still {rest} miles away.", speed * hours, "+", rest, "the trip is # miles in all"),
    ]
    story = f"One {vehicle} leaves {start} to reach {end}. {steps[0][0]} {steps[1][0]}"
    return _solve(steps, "How many miles is the trip in all?", "miles", story)


def round_trips(s: Slots) -> Document:
    name, (home, work), miles, days = s.pick(NAMES), s.pick_distinct(PLACES, 2), s.number(2, 10), s.number(2, 9)
    then = f"{name} goes there and back once a day for {days} days."
    steps = [
        (f"It is {miles} miles from {home} to {work}.", miles, "*", 2, "one trip there and back is # miles"),
        (then, miles * 2, "*", days, f"{name} travels # miles in all"),
    ]
    return _solve(steps, f"How many miles does {name} travel in all?", "miles")


def passengers_off_and_on(s: Slots) -> Document:
    vehicle, place, riders, on = s.pick(VEHICLES), s.pick(PLACES), s.number(4, 12), s.number(2, 12)
    off = _part(s, riders)
    first = f"There are {riders} people on the {vehicle}, and {off} people get off at {place}."
    steps = [
        (first, riders, "-", off, "there are # people left"),
        (f"Then {on} people get on.", riders - off, "+", on, f"there are # people on the {vehicle} now"),
    ]
    return _solve(steps, f"How many people are on the {vehicle} now?", "people")


def empty_seats_on_board(s: Slots) -> Document:
    vehicle, rows, each = s.pick(VEHICLES), s.number(2, 12), s.number(2, 8)
    taken = _part(s, rows * each)
    steps = [
        (f"The {vehicle} has {rows} rows with {each} seats in each row.", rows, "*", each, "there are # seats in all"),
        (f"People sit on {taken} of the seats.", rows * each, "-", taken, "there are # seats left"),
    ]
    return _solve(steps, f"How many seats on the {vehicle} are left?", "seats")


def journey_in_stages(s: Slots) -> Document:
    name, place, a, b, c = s.pick(NAMES), s.pick(PLACES), s.number(2, 12), s.number(2, 12), s.number(2, 12)
    first = f"On day one {name} walks {a} miles and on day two {b} miles."
    steps = [
        (first, a, "+", b, f"{name} walks # miles in two days"),
        (f"On day three {name} walks {c} miles and gets to {place}.", a + b, "+", c, f"{name} walks # miles in all"),
    ]
    return _solve(steps, f"How many miles does {name} walk in all?", "miles")


def practice_minutes(s: Slots) -> Document:
    (name, friend), sport = s.pick_distinct(NAMES, 2), s.pick(SPORTS)
    days, each = s.number(2, 9), s.number(4, 12)
    less = _part(s, days * each)
    first = f"{name} practices {sport} for {each} minutes a day on {days} days."
    then = f"{friend} practices {less} minutes less than {name}."
    steps = [
        (first, each, "*", days, f"{name} practices for # minutes"),
        (then, days * each, "-", less, f"{friend} practices for # minutes"),
    ]
    return _solve(steps, f"How many minutes does {friend} practice?", "minutes")


def waiting_for_departure(s: Slots) -> Document:
    name, vehicle, place, wait = s.pick(NAMES), s.pick(VEHICLES), s.pick(PLACES), s.number(8, 14)
    walk = s.number(2, wait - 4)
    shop = _part(s, wait - walk)
    first = f"The {vehicle} leaves in {wait} minutes, and {name} walks {walk} minutes to {place}."
    steps = [
        (first, wait, "-", walk, f"{name} has # minutes left"),
        (f"There {name} shops for {shop} minutes.", wait - walk, "-", shop, f"{name} has # minutes left"),
    ]
    return _solve(steps, f"How many minutes does {name} have left?", "minutes")


def trays_baked_and_eaten(s: Slots) -> Document:
    name, baked, trays, each = s.pick(NAMES), s.pick(BAKED), s.number(2, 12), s.number(2, 12)
    eaten = _part(s, trays * each)
    first = f"{name} bakes {trays} trays of {baked} with {each} {baked} on each tray."
    steps = [
        (first, trays, "*", each, f"there are # {baked} in all"),
        (f"The family eats {eaten} {baked}.", trays * each, "-", eaten, f"there are # {baked} left"),
    ]
    return _solve(steps, f"How many {baked} are left?", baked)


def eggs_for_baking(s: Slots) -> Document:
    name, (cake, cakes) = s.pick(NAMES), s.pick(TREATS)
    count, each = s.number(2, 4), s.number(2, 4)
    eggs = s.number(count * each + 2, 20)
    first = f"{name} makes {count} {cakes} and uses {each} eggs for each {cake}."
    steps = [
        (first, count, "*", each, f"{name} uses # eggs"),
        (f"{name} had {eggs} eggs.", eggs, "-", count * each, f"{name} has # eggs left"),
    ]
    return _solve(steps, f"How many eggs does {name} have left?", "eggs")


def recipe_enlarged(s: Slots) -> Document:
    name, baked, flour, sugar, times = s.pick(NAMES), s.pick(BAKED), s.number(2, 9), s.number(2, 9), s.number(2, 9)
    first = f"A recipe for {baked} needs {flour} cups of flour and {sugar} cups of sugar."
    steps = [
        (first, flour, "+", sugar, "one recipe needs # cups"),
        (f"{name} makes the recipe {times} times.", flour + sugar, "*", times, f"{name} needs # cups in all"),
    ]
    return _solve(steps, f"How many cups of flour and sugar does {name} need in all?", "cups")


def slices_for_guests(s: Slots) -> Document:
    name, (cake, cakes) = s.pick(NAMES), s.pick(TREATS)
    guests, count, share = s.number(2, 6), s.number(2, 9), s.number(2, 3)
    slices = guests * share
    first = f"{name} cuts {count} {cakes} into {slices} slices per {cake}."
    then = f"The slices are for {guests} guests in equal parts."
    steps = [
        (first, count, "*", slices, "there are # slices in all"),
        (then, count * slices, "/", guests, "each guest gets # slices"),
    ]
    return _solve(steps, "How many slices does each guest get?", "slices")


def half_of_baking_sold(s: Slots) -> Document:
    name, baked, trays, half = s.pick(NAMES), s.pick(BAKED), s.number(2, 9), s.number(2, 9)
    more = _part(s, trays * half)
    first = f"{name} bakes {trays} trays with {half * 2} {baked} on each tray."
    steps = [
        (first, trays, "*", half * 2, f"there are # {baked} in all"),
        (f"{name} sells half of the {baked}.", trays * half * 2, "/", 2, f"there are # {baked} left"),
        (f"Then {name} gives away {more} {baked}.", trays * half, "-", more, f"there are # {baked} left"),
    ]
    return _solve(steps, f"How many {baked} are left?", baked)


def pouring_drinks(s: Slots) -> Document:
    name, drink, jugs, each, extra = s.pick(NAMES), s.pick(DRINKS), s.number(2, 9), s.number(2, 9), s.number(2, 12)
    first = f"{name} makes {jugs} jugs of {drink} and fills {each} glasses from each jug."
    steps = [
        (first, jugs, "*", each, "there are # glasses"),
        (f"From a bottle {name} fills {extra} more glasses.", jugs * each, "+", extra, "there are # glasses in all"),
    ]
    return _solve(steps, f"How many glasses of {drink} are there in all?", "glasses")


def chapters_read(s: Slots) -> Document:
    name, chapters, each = s.pick(NAMES), s.number(2, 12), s.number(2, 12)
    read = _part(s, chapters * each)
    first = f"{name} has a book of {chapters} chapters with {each} pages in each chapter."
    steps = [
        (first, chapters, "*", each, "the book has # pages in all"),
        (f"{name} has read {read} pages.", chapters * each, "-", read, f"{name} has # pages left"),
    ]
    return _solve(steps, f"How many pages does {name} have left?", "pages")


def two_readers(s: Slots) -> Document:
    (name, friend), a, b, days = s.pick_distinct(NAMES, 2), s.number(2, 9), s.number(2, 9), s.number(2, 10)
    first = f"Every day {name} reads {a} pages and {friend} reads {b} pages."
    steps = [
        (first, a, "+", b, f"{name} and {friend} read # pages a day"),
        (f"{name} and {friend} read for {days} days.", a + b, "*", days, f"{name} and {friend} read # pages in all"),
    ]
    return _solve(steps, f"How many pages do {name} and {friend} read in all?", "pages")


def days_to_finish_reading(s: Slots) -> Document:
    name, each, days = s.pick(NAMES), s.number(2, 4), s.number(2, 4)
    pages = s.number(each * days + 2, 20)
    read = pages - each * days
    steps = [
        (f"A story has {pages} pages, and {name} has read {read} pages.", pages, "-", read, f"{name} has # pages left"),
        (f"Now {name} reads {each} pages a day.", pages - read, "/", each, f"{name} needs # days"),
    ]
    return _solve(steps, f"How many days does {name} need to finish the story?", "days")


def reading_faster(s: Slots) -> Document:
    name, slow, more, days = s.pick(NAMES), s.number(2, 8), s.number(2, 8), s.number(2, 6)
    faster = slow + more
    first = f"In week one {name} reads {slow} pages a day for {days} days."
    then = f"In week two {name} reads {more} pages a day more than in week one."
    steps = [
        (first, slow, "*", days, f"{name} reads # pages in week one"),
        (then, slow, "+", more, f"{name} reads # pages a day"),
        (f"{name} reads for {days} days in week two.", faster, "*", days, f"{name} reads # pages in week two"),
        (f"{name} adds up the two weeks.", slow * days, "+", faster * days, f"{name} reads # pages in all"),
    ]
    return _solve(steps, f"How many pages does {name} read in all?", "pages")


def classroom_groups(s: Slots) -> Document:
    size, groups, color = s.number(2, 6), s.number(2, 6), s.pick(COLORS)
    girls = s.number(max(2, size * groups - 20), min(20, size * groups - 2))
    boys = size * groups - girls
    first = f"In the {color} classroom there are {girls} girls and {boys} boys."
    steps = [
        (first, girls, "+", boys, "there are # children in all"),
        (f"The teacher makes groups of {size} children.", size * groups, "/", size, "there are # groups"),
    ]
    return _solve(steps, "How many groups are there?", "groups")


def points_in_a_test(s: Slots) -> Document:
    name, right, points = s.pick(NAMES), s.number(2, 12), s.number(2, 12)
    lost = _part(s, right * points)
    first = f"{name} answers {right} questions and gets {points} points for each answer."
    steps = [
        (first, right, "*", points, f"{name} gets # points"),
        (f"{name} loses {lost} points for spelling.", right * points, "-", lost, f"{name} has # points left"),
    ]
    return _solve(steps, f"How many points does {name} have left?", "points")


def words_learned(s: Slots) -> Document:
    name, words, days, known = s.pick(NAMES), s.number(2, 12), s.number(2, 12), s.number(2, 12)
    steps = [
        (f"{name} learns {words} new words a day for {days} days.", words, "*", days, f"{name} learns # words"),
        (f"Before that {name} knew {known} words.", words * days, "+", known, f"{name} knows # words in all"),
    ]
    return _solve(steps, f"How many words does {name} know in all?", "words")


def rows_of_plants(s: Slots) -> Document:
    name, crop, rows, each = s.pick(NAMES), s.pick(CROPS), s.number(2, 12), s.number(2, 12)
    dry = _part(s, rows * each)
    first = f"{name} plants {rows} rows of {crop} plants with {each} plants in each row."
    steps = [
        (first, rows, "*", each, "there are # plants in all"),
        (f"In the hot summer {dry} plants die.", rows * each, "-", dry, "there are # plants left"),
    ]
    return _solve(steps, f"How many {crop} plants are left?", "plants")


def two_crops(s: Slots) -> Document:
    name, (crop, other), rows = s.pick(NAMES), s.pick_distinct(CROPS, 2), s.number(2, 9)
    a, b = s.number(2, 10), s.number(2, 10)
    steps = [
        (f"One row holds {a} {crop} plants and {b} {other} plants.", a, "+", b, "there are # plants in one row"),
        (f"{name} plants {rows} rows like this.", a + b, "*", rows, "there are # plants in all"),
    ]
    return _solve(steps, f"How many plants does {name} have in all?", "plants")


def seeds_into_pots(s: Slots) -> Document:
    name, crop, bags, pots, share = s.pick(NAMES), s.pick(CROPS), s.number(2, 9), s.number(2, 5), s.number(2, 4)
    seeds = pots * share
    first = f"{name} buys {bags} bags of {crop} seeds with {seeds} seeds in each bag."
    then = f"{name} puts the same number of seeds into each of {pots} pots."
    steps = [
        (first, bags, "*", seeds, f"{name} has # seeds in all"),
        (then, bags * seeds, "/", pots, "each pot gets # seeds"),
    ]
    return _solve(steps, "How many seeds does each pot get?", "seeds")


def fruit_from_trees(s: Slots) -> Document:
    name, fruit, trees, each = s.pick(NAMES), s.pick(FRUITS), s.number(2, 12), s.number(2, 12)
    rotten = _part(s, trees * each)
    steps = [
        (f"{name} picks {each} {fruit} from each of {trees} trees.", each, "*", trees, f"{name} has # {fruit} in all"),
        (f"But {rotten} {fruit} are rotten.", each * trees, "-", rotten, f"there are # good {fruit} left"),
    ]
    return _solve(steps, f"How many good {fruit} are left?", fruit)


def third_of_the_harvest(s: Slots) -> Document:
    (name, friend), fruit, baskets, third = s.pick_distinct(NAMES, 2), s.pick(FRUITS), s.number(2, 9), s.number(2, 6)
    total = baskets * third * 3
    first = f"{name} picks {baskets} baskets with {third * 3} {fruit} in each basket."
    steps = [
        (first, baskets, "*", third * 3, f"{name} has # {fruit} in all"),
        (f"{name} gives a third of the {fruit} to {friend}.", total, "/", 3, f"{friend} gets # {fruit}"),
        (f"{name} keeps the rest.", total, "-", total // 3, f"{name} has # {fruit} left"),
    ]
    return _solve(steps, f"How many {fruit} does {name} have left?", fruit)


def animals_in_pens(s: Slots) -> Document:
    name, animals, pens, each, more = s.pick(NAMES), s.pick(ANIMALS), s.number(2, 12), s.number(2, 12), s.number(2, 12)
    first = f"The farm of {name} has {pens} pens with {each} {animals} in each pen."
    steps = [
        (first, pens, "*", each, f"there are # {animals} in the pens"),
        (f"On the grass there are {more} more {animals}.", pens * each, "+", more, f"there are # {animals} in all"),
    ]
    return _solve(steps, f"How many {animals} are there in all?", animals)


def animals_sold_and_bought(s: Slots) -> Document:
    name, animals, place, has, bought = s.pick(NAMES), s.pick(ANIMALS), s.pick(PLACES), s.number(4, 12), s.number(2, 12)
    sold = _part(s, has)
    first = f"{name} owns {has} {animals} and sells {sold} {animals} near {place}."
    steps = [
        (first, has, "-", sold, f"{name} has # {animals} left"),
        (f"Later {name} buys {bought} {animals}.", has - sold, "+", bought, f"{name} has # {animals} now"),
    ]
    return _solve(steps, f"How many {animals} does {name} have now?", animals)


def feeding_animals(s: Slots) -> Document:
    (animals, others), a, b, food = s.pick_distinct(ANIMALS, 2), s.number(2, 9), s.number(2, 9), s.number(2, 10)
    steps = [
        (f"A farmer has {a} {animals} and {b} {others}.", a, "+", b, "there are # animals in all"),
        (f"Every animal eats {food} pounds of food a day.", a + b, "*", food, "the animals eat # pounds a day"),
    ]
    return _solve(steps, "How many pounds of food do the animals eat a day?", "pounds")


def fence_around(s: Slots) -> Document:
    name, ground, length, width = s.pick(NAMES), s.pick(GROUNDS), s.number(2, 12), s.number(2, 12)
    first = f"The {ground} of {name} is {length} meters long and {width} meters wide."
    steps = [
        (first, length, "+", width, "one long and one short side are # meters"),
        ("A fence goes around all sides.", length + width, "*", 2, "the fence is # meters long"),
    ]
    return _solve(steps, "How many meters of fence are needed?", "meters")


def area_with_a_pond(s: Slots) -> Document:
    ground, length, width = s.pick(GROUNDS), s.number(2, 12), s.number(2, 12)
    pond = _part(s, length * width)
    first = f"A {ground} is {length} meters long and {width} meters wide."
    steps = [
        (first, length, "*", width, f"the area of the {ground} is # square meters"),
        (f"A pond covers {pond} square meters.", length * width, "-", pond, "there are # square meters left"),
    ]
    return _solve(steps, f"How many square meters of the {ground} are left?", "square meters")


def two_areas(s: Slots) -> Document:
    name, color, (a, b, c, d) = s.pick(NAMES), s.pick(COLORS), (s.number(2, 9) for _ in range(4))
    first = f"One {color} wall is {a} meters long and {b} meters high."
    then = f"The next wall is {c} meters long and {d} meters high."
    steps = [
        (first, a, "*", b, "the area of one wall is # square meters"),
        (then, c, "*", d, "the area of the next wall is # square meters"),
        (f"{name} paints both walls.", a * b, "+", c * d, f"{name} paints # square meters in all"),
    ]
    return _solve(steps, f"How many square meters does {name} paint in all?", "square meters")


def laps_around_a_square(s: Slots) -> Document:
    name, ground, side, laps = s.pick(NAMES), s.pick(GROUNDS), s.number(2, 8), s.number(2, 6)
    steps = [
        (f"A square {ground} has 4 sides of {side} meters each.", 4, "*", side, "one lap is # meters"),
        (f"{name} runs {laps} laps around the {ground}.", 4 * side, "*", laps, f"{name} runs # meters in all"),
    ]
    return _solve(steps, f"How many meters does {name} run in all?", "meters")


def ribbon_cut(s: Slots) -> Document:
    name, color, piece, pieces = s.pick(NAMES), s.pick(COLORS), s.number(2, 4), s.number(2, 4)
    length = s.number(piece * pieces + 2, 20)
    used = length - piece * pieces
    first = f"{name} has {length} meters of {color} ribbon and uses {used} meters for a gift."
    steps = [
        (first, length, "-", used, f"{name} has # meters left"),
        (f"{name} cuts the rest into pieces of {piece} meters.", length - used, "/", piece, f"{name} gets # pieces"),
    ]
    return _solve(steps, f"How many pieces does {name} get?", "pieces")


def older_in_total(s: Slots) -> Document:
    (name, friend), age, older = s.pick_distinct(NAMES, 2), s.number(2, 12), s.number(2, 12)
    steps = [
        (f"{friend} is {older} years older than {name}.", age, "+", older, f"{friend} is # years old"),
        (f"{name} is {age} years old.", age + older, "+", age, f"{name} and {friend} are # years old in all"),
    ]
    story = f"{name} is {age} years old. {steps[0][0]}"
    return _solve(steps, f"How many years old are {name} and {friend} in all?", "years", story)


def age_after_years(s: Slots) -> Document:
    (name, friend), age, times, later = s.pick_distinct(NAMES, 2), s.number(2, 12), s.number(2, 5), s.number(2, 12)
    first = f"{name} is {age} years old and {friend} is {times} times as old."
    then = f"{name} and {friend} meet again after {later} years."
    steps = [
        (first, age, "*", times, f"{friend} is # years old"),
        (then, age * times, "+", later, f"{friend} is # years old then"),
    ]
    return _solve(steps, f"How many years old is {friend} then?", "years")


def younger_twice(s: Slots) -> Document:
    (name, friend, third), age = s.pick_distinct(NAMES, 3), s.number(2, 12)
    younger = _part(s, age * 2)
    steps = [
        (f"{friend} is twice as old as {name}.", age, "*", 2, f"{friend} is # years old"),
        (f"{third} is {younger} years younger than {friend}.", age * 2, "-", younger, f"{third} is # years old"),
    ]
    story = f"{name} is {age} years old. {steps[0][0]} {steps[1][0]}"
    return _solve(steps, f"How many years old is {third}?", "years", story)


def age_of_a_building(s: Slots) -> Document:
    (place, other), age, older, later = s.pick_distinct(PLACES, 2), s.number(2, 12), s.number(2, 12), s.number(2, 12)
    steps = [
        (f"The town built {place} {older} years before {other}.", age, "+", older, f"{place} is # years old"),
        (f"A feast is planned in {later} years.", age + older, "+", later, f"{place} is # years old at the feast"),
    ]
    story = f"In one town {other} is {age} years old. {steps[0][0]} {steps[1][0]}"
    return _solve(steps, f"How many years old is {place} at the feast?", "years", story)


def teams_of_players(s: Slots) -> Document:
    sport, teams, each = s.pick(SPORTS), s.number(2, 12), s.number(2, 12)
    home = _part(s, teams * each)
    first = f"At a {sport} camp there are {teams} teams with {each} players in each team."
    steps = [
        (first, teams, "*", each, "there are # players in all"),
        (f"Because of rain {home} players go home.", teams * each, "-", home, "there are # players left"),
    ]
    return _solve(steps, "How many players are left?", "players")


def points_in_games(s: Slots) -> Document:
    (name, friend), sport = s.pick_distinct(NAMES, 2), s.pick(SPORTS)
    games, a, b = s.number(2, 9), s.number(2, 10), s.number(2, 10)
    steps = [
        (f"In {games} {sport} games {name} scores {a} points per game.", games, "*", a, f"{name} scores # points"),
        (f"In the same {games} games {friend} scores {b} points per game.", games, "*", b, f"{friend} scores # points"),
        ("Both play for one team.", games * a, "+", games * b, f"{name} and {friend} score # points in all"),
    ]
    return _solve(steps, f"How many points do {name} and {friend} score in all?", "points")


def players_split_into_teams(s: Slots) -> Document:
    sport, teams, size = s.pick(SPORTS), s.number(2, 4), s.number(2, 4)
    extra = s.number(2, 20 - teams * size)
    players = teams * size + extra
    first = f"For a {sport} game {players} children come, but {extra} children only watch."
    steps = [
        (first, players, "-", extra, "there are # players left"),
        (f"The players make {teams} equal teams.", players - extra, "/", teams, "each team has # players"),
    ]
    return _solve(steps, "How many players does each team have?", "players")


def seats_in_a_hall(s: Slots) -> Document:
    place, rows, each, chairs = s.pick(PLACES), s.number(2, 12), s.number(2, 12), s.number(2, 12)
    seats = rows * each + chairs
    guests = _part(s, seats)
    first = f"For a concert at {place} there are {rows} rows of {each} seats."
    steps = [
        (first, rows, "*", each, "there are # seats in the rows"),
        (f"Helpers bring {chairs} more seats.", rows * each, "+", chairs, "there are # seats in all"),
        (f"Then {guests} guests sit down.", seats, "-", guests, "there are # seats left"),
    ]
    return _solve(steps, "How many seats are left?", "seats")


def guests_at_tables(s: Slots) -> Document:
    (name, friend), size, tables = s.pick_distinct(NAMES, 2), s.number(2, 6), s.number(2, 6)
    a = s.number(max(2, size * tables - 20), min(20, size * tables - 2))
    b = size * tables - a
    steps = [
        (f"{name} invites {a} guests and {friend} invites {b} guests.", a, "+", b, "there are # guests in all"),
        (f"At each table {size} guests can sit.", size * tables, "/", size, "there are # tables"),
    ]
    return _solve(steps, "How many tables are needed?", "tables")


def machine_output(s: Slots) -> Document:
    thing, place, rate, hours = s.pick(THINGS), s.pick(PLACES), s.number(2, 12), s.number(2, 12)
    broken = _part(s, rate * hours)
    first = f"A machine near {place} makes {rate} {thing} per hour and runs for {hours} hours."
    steps = [
        (first, rate, "*", hours, f"the machine makes # {thing}"),
        (f"Of these {broken} {thing} are broken.", rate * hours, "-", broken, f"there are # good {thing} left"),
    ]
    return _solve(steps, f"How many good {thing} are left?", thing)


def tank_filled_and_leaking(s: Slots) -> Document:
    drink, fill, minutes = s.pick(DRINKS), s.number(4, 12), s.number(2, 10)
    leak = _part(s, fill)
    first = f"A pipe puts {fill} liters of {drink} into a tank each minute, and {leak} liters leak out."
    steps = [
        (first, fill, "-", leak, "the tank gains # liters each minute"),
        (f"The pipe is open for {minutes} minutes.", fill - leak, "*", minutes, "there are # liters in the tank"),
    ]
    return _solve(steps, f"How many liters of {drink} are in the tank?", "liters")


def two_workers(s: Slots) -> Document:
    (name, friend), thing = s.pick_distinct(NAMES, 2), s.pick(THINGS)
    a, b, hours, ready = s.number(2, 9), s.number(2, 9), s.number(2, 9), s.number(2, 12)
    first = f"In one hour {name} paints {a} {thing} and {friend} paints {b} {thing}."
    last = f"Before that {ready} {thing} were painted."
    steps = [
        (first, a, "+", b, f"{name} and {friend} paint # {thing} an hour"),
        (f"{name} and {friend} work for {hours} hours.", a + b, "*", hours, f"{name} and {friend} paint # {thing}"),
        (last, (a + b) * hours, "+", ready, f"there are # painted {thing} in all"),
    ]
    return _solve(steps, f"How many painted {thing} are there in all?", thing)


def half_then_some(s: Slots) -> Document:
    (name, friend), thing, half = s.pick_distinct(NAMES, 2), s.pick(THINGS), s.number(4, 10)
    more = _part(s, half)
    first = f"{name} has {half * 2} {thing} and sells half of the {thing}."
    steps = [
        (first, half * 2, "/", 2, f"{name} has # {thing} left"),
        (f"{name} gives {more} of the rest to {friend}.", half, "-", more, f"{name} has # {thing} left"),
    ]
    return _solve(steps, f"How many {thing} does {name} have left?", thing)


TEMPLATES: tuple[Template, ...] = (
    boxes_given_away,
    boxes_and_loose,
    two_kinds_of_containers,
    containers_shared,
    some_containers_empty,
    packing_into_containers,
    containers_lost_and_found,
    gets_and_gives,
    more_than_a_friend,
    fewer_than_a_friend,
    times_as_many,
    doubled_collection,
    three_friends_compare,
    how_many_more,
    change_from_shopping,
    two_goods_bought,
    discount_on_total,
    discount_on_each,
    delivery_fee,
    weekly_saving_and_gift,
    saving_then_spending,
    weeks_to_a_goal,
    selling_drinks,
    wages_and_tip,
    bill_shared,
    tickets_for_a_family,
    hours_on_the_road,
    round_trips,
    passengers_off_and_on,
    empty_seats_on_board,
    journey_in_stages,
    practice_minutes,
    waiting_for_departure,
    trays_baked_and_eaten,
    eggs_for_baking,
    recipe_enlarged,
    slices_for_guests,
    half_of_baking_sold,
    pouring_drinks,
    chapters_read,
    two_readers,
    days_to_finish_reading,
    reading_faster,
    classroom_groups,
    points_in_a_test,
    words_learned,
    rows_of_plants,
    two_crops,
    seeds_into_pots,
    fruit_from_trees,
    third_of_the_harvest,
    animals_in_pens,
    animals_sold_and_bought,
    feeding_animals,
    fence_around,
    area_with_a_pond,
    two_areas,
    laps_around_a_square,
    ribbon_cut,
    older_in_total,
    age_after_years,
    younger_twice,
    age_of_a_building,
    teams_of_players,
    points_in_games,
    players_split_into_teams,
    seats_in_a_hall,
    guests_at_tables,
    machine_output,
    tank_filled_and_leaking,
    two_workers,
    half_then_some,
)
# Never trained on.
HELD_OUT: frozenset[str] = frozenset(
    (
        "containers_lost_and_found",
        "times_as_many",
        "delivery_fee",
        "weeks_to_a_goal",
        "empty_seats_on_board",
        "practice_minutes",
        "slices_for_guests",
        "chapters_read",
        "two_crops",
        "area_with_a_pond",
        "younger_twice",
        "machine_output",
    )
)
