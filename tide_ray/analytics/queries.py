"""The SQL of a run's figures. Each text is filled with ``rows`` (the run's rows, in parentheses) or ``run`` (its name).

Lists are unnested as they are read and grouped at once, so that memory follows the number of groups.
"""

from __future__ import annotations

PERCENTILES = (50, 90, 99)
MAX_CATEGORIES = 20
NUM_SLOWEST, NUM_ERRORS = 10, 10

TOTALS = """
SELECT count(*) AS num_rows,
       coalesce(sum(num_generated_tokens), 0)::BIGINT AS tokens,
       coalesce(sum(num_input_tokens), 0)::BIGINT AS prompt_tokens,
       count(*) FILTER (finish_reason = 'length') AS cut_short,
       count(*) FILTER (len(token_times_us) > 0) AS timed_rows,
       count(finished_at) AS dated_rows,
       median(num_generated_tokens) AS median_tokens,
       median(num_input_tokens) AS median_prompt_tokens,
       epoch_us(min(finished_at - to_microseconds(total_time_us))) AS first_us,
       epoch_us(max(finished_at)) AS last_us
FROM {rows}
"""

BY_TOKEN = """
SELECT CASE WHEN position = 0 THEN 0 ELSE 1 + floor(log2(greatest(position, 1)))::INTEGER END AS bucket,
       token_class, depth, count(*) AS tokens
FROM tokens WHERE run = {run} GROUP BY ALL ORDER BY bucket, token_class, depth
"""

BY_PROMPT_LENGTH = """
SELECT bucket, depth, count(*) AS tokens
FROM (SELECT floor(log2(greatest(num_input_tokens, 1)))::INTEGER AS bucket, unnest(exit_layers) AS depth FROM {rows})
GROUP BY ALL ORDER BY bucket, depth
"""

BY_CATEGORY = f"""
WITH counts AS (
    SELECT category, depth, count(*) AS tokens
    FROM (SELECT coalesce({{column}}::VARCHAR, '(none)') AS category, unnest(exit_layers) AS depth FROM {{rows}})
    GROUP BY ALL
), largest AS (
    SELECT category, sum(tokens) AS total FROM counts GROUP BY category ORDER BY total DESC, category
    LIMIT {MAX_CATEGORIES}
)
SELECT category, depth, tokens FROM counts JOIN largest USING (category) ORDER BY total DESC, category, depth
"""

NUM_VALUES = "SELECT {counts} FROM {rows}"

FIRST_TIMES = "SELECT 0 AS depth, token_times_us[1] AS time_us FROM {rows} WHERE len(token_times_us) > 0"
LATER_TIMES = """
SELECT unnest(exit_layers[2:]) AS depth, unnest(token_times_us[2:]) AS time_us FROM {rows}
WHERE len(token_times_us) > 1
"""
"""All tokens but an answer's first, whose time has the prompt in it."""

_RANKED = """
WITH counts AS (SELECT depth, time_us, count(*) AS n FROM ({times}) GROUP BY ALL),
     ranks AS (SELECT depth, time_us, n, sum(n) OVER (PARTITION BY depth ORDER BY time_us) AS upto,
                      sum(n) OVER (PARTITION BY depth) AS num FROM counts)
SELECT depth, max(num)::BIGINT AS tokens, (sum(n * time_us) / sum(n))::DOUBLE AS mean, {percentiles}
FROM ranks GROUP BY depth ORDER BY depth
"""

OVER_TIME = """
WITH spans AS (
    SELECT (epoch_us(finished_at) - total_time_us + queue_time_us - {first_us}) / {width_us} AS a,
           (epoch_us(finished_at) - {first_us}) / {width_us} AS b, num_generated_tokens AS n
    FROM {rows} WHERE finished_at IS NOT NULL
), parts AS (
    SELECT unnest(range(greatest(floor(a), 0)::BIGINT, least(floor(b), {num} - 1)::BIGINT + 1)) AS number, a, b, n
    FROM spans
)
SELECT number, sum(least(b, number + 1) - greatest(a, number)) AS residents,
       sum(n * CASE WHEN b > a THEN (least(b, number + 1) - greatest(a, number)) / (b - a) ELSE 1 END) AS tokens
FROM parts GROUP BY number ORDER BY number
"""
"""Of equal intervals: resident sequences on average, and tokens, a row's spread evenly from admission to end."""

ERRORS = f"""
SELECT stage, left(error, 300) AS error, count(*) AS num_rows, min(row_id) AS example, max(attempts) AS attempts
FROM errors WHERE run = {{run}} GROUP BY ALL ORDER BY num_rows DESC, stage, error LIMIT {NUM_ERRORS}
"""

NUM_ROWS_WITH_ERRORS = "SELECT count(*) AS num_rows FROM errors WHERE run = {run}"

SLOWEST = f"""
SELECT row_id, total_time_us, queue_time_us, token_times_us[1] AS first_token_us, num_input_tokens,
       num_generated_tokens, mean_exit_layer
FROM {{rows}} WHERE total_time_us IS NOT NULL
ORDER BY total_time_us - coalesce(queue_time_us, 0) DESC, row_id LIMIT {NUM_SLOWEST}
"""
"""By the time since admission: by all of it these would be the rows that came last, which waited longest."""

SAMPLE = """
SELECT row_id, prompt, generated_tokens[:{max_tokens}] AS token_ids, exit_layers[:{max_tokens}] AS depths,
       num_generated_tokens, mean_exit_layer
FROM {rows} WHERE num_generated_tokens > 0 ORDER BY hash(row_id), row_id LIMIT {num_rows}
"""


def percentiles(times: str) -> str:
    """Of ``depth`` and ``time_us``: by depth, the smallest time that at least q % do not exceed (nearest rank)."""
    columns = [f"min(time_us) FILTER (upto * 100 >= num * {q}) AS p{q}" for q in PERCENTILES]
    return _RANKED.format(times=times, percentiles=", ".join(columns))


def identifier(name: str) -> str:
    """``name`` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
