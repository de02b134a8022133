"""Numbers that the noise is made of, the same on every device."""

# Tokens of a group, and groups side by side: token = (chunk * GROUP + member) * LANES + lane, its group is
# chunk * LANES + lane. Members lie LANES apart, so that the maxima of neighbouring groups are one vector operation.
GROUP = 32
LANES = 64
CHUNK = GROUP * LANES

# By how much a bound may be wrong: another logarithm differs, and between neighbours `reproducible_log` may fall.
SLACK = 1e-5

# Of `reproducible_log`, the highest power first; the logarithm of 2 in two parts, of which the first has few bits.
LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LOG_2_HIGH, LOG_2_LOW = 0.693359375, -2.12194440e-4
