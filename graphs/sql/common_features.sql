-- The k features that lie on a path from any of the words to the most probable logit in most graphs; with NULL for the
-- words, from any token. `graphs` counts the graphs, `share` is their part of the graphs that have a word, `nodes`
-- counts the places. Features of two revisions of a transcoder are not the same. Paths through error nodes do not
-- count. Graphs of version 1 need `trace compact` first.
-- Example: FROM common_features(['Dallas', 'Oakland'], 20)
CREATE MACRO common_features(words, k) AS TABLE
WITH starts AS MATERIALIZED (
    SELECT n.graph_id, list(n.position) AS positions
    FROM nodes AS n
    WHERE n.kind = 'token' AND (words IS NULL OR list_contains(words, n.word) OR list_contains(words, n.token))
    GROUP BY n.graph_id
),
counted AS (
    SELECT i.transcoder, i.transcoder_revision, n.layer, n.feature,
        count(DISTINCT n.graph_id) AS graphs, count(*) AS nodes,
        avg(n.influence) AS mean_influence, any_value(n.label) AS label
    FROM nodes AS n
    JOIN starts AS s ON s.graph_id = n.graph_id
    JOIN graphs AS i ON i.graph_id = n.graph_id
    WHERE n.kind = 'feature' AND CASE WHEN n.reached_from IS NULL
        THEN error('graph ' || n.graph_id || ' was saved by version 1; run trace compact, then ask again')
        ELSE n.reaches_answer AND list_has_any(n.reached_from, s.positions) END
    GROUP BY i.transcoder, i.transcoder_revision, n.layer, n.feature
)
SELECT
    c.transcoder, c.layer, c.feature, c.label, c.graphs, c.graphs / (SELECT count(*) FROM starts) AS share, c.nodes,
    c.mean_influence, c.transcoder_revision
FROM counted AS c
QUALIFY row_number() OVER (ORDER BY c.graphs DESC, c.mean_influence DESC, c.layer, c.feature) <= k
ORDER BY c.graphs DESC, c.mean_influence DESC, c.layer, c.feature;
