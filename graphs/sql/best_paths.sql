-- What `strongest_path` and `paths_between` are made of: the strongest path to one node per graph. It ends at node
-- `goal`, or at the logit of most weight if that is NULL; it starts at node `start` of the graph `graph`, or if those
-- are NULL at any token of the word `from_word`, in every graph that has it. Edges that lead from start to end at once
-- count only if `direct`.
-- Example: FROM best_paths('Dallas', NULL, NULL, NULL, true)
CREATE MACRO best_paths(from_word, graph, start, goal, direct) AS TABLE
WITH RECURSIVE
-- read once: with many graphs, opening the files takes longest
every AS MATERIALIZED (
    SELECT n.graph_id, n.node, n.kind, n.layer, n.feature, n.token, n.word, n.label, n.probability, n.input_size
    FROM nodes AS n
    WHERE graph IS NULL OR n.graph_id = graph
),
starts AS MATERIALIZED (
    SELECT n.graph_id, n.node
    FROM every AS n
    WHERE CASE WHEN graph IS NULL
        THEN n.kind = 'token' AND (n.word = from_word OR n.token = from_word)
        ELSE n.graph_id = graph AND n.node = start
    END
),
answers AS (
    SELECT n.graph_id, arg_max(n.node, {'probability': n.probability, 'node': -n.node}) AS node
    FROM every AS n
    WHERE n.kind = 'logit' AND n.probability IS NOT NULL AND n.graph_id IN (SELECT s.graph_id FROM starts AS s)
    GROUP BY n.graph_id
),
goals AS (
    SELECT s.graph_id, coalesce(goal, any_value(a.node)) AS node
    FROM starts AS s LEFT JOIN answers AS a ON a.graph_id = s.graph_id
    GROUP BY s.graph_id
),
shares AS MATERIALIZED (
    SELECT e.graph_id, e.source, e.target,
        input_share(e.weight, sum(abs(e.weight)) OVER (PARTITION BY e.graph_id, e.target), t.input_size) AS share
    FROM edges AS e JOIN every AS t ON t.graph_id = e.graph_id AND t.node = e.target
    WHERE (graph IS NULL OR e.graph_id = graph) AND e.graph_id IN (SELECT s.graph_id FROM starts AS s)
),
-- no path leads through an error node; only its first node may be one
steps AS MATERIALIZED (
    SELECT s.*
    FROM shares AS s
    JOIN every AS n ON n.graph_id = s.graph_id AND n.node = s.source
    WHERE s.share > 0
        AND (n.kind <> 'error' OR EXISTS (FROM starts AS b WHERE b.graph_id = s.graph_id AND b.node = s.source))
        AND (direct OR NOT (
            EXISTS (FROM starts AS b WHERE b.graph_id = s.graph_id AND b.node = s.source)
            AND EXISTS (FROM goals AS g WHERE g.graph_id = s.graph_id AND g.node = s.target)
        ))
),
-- Bellman-Ford from the goal down: per node the strongest way found so far, passed on whenever it improves
ways(graph_id, node, strength, path) USING KEY (graph_id, node) AS (
    SELECT g.graph_id, g.node, 1.0::DOUBLE, [g.node]
    FROM goals AS g
    WHERE g.node IS NOT NULL
    UNION
    SELECT s.graph_id, s.source, max(s.share * w.strength),
        arg_max(list_prepend(s.source, w.path), s.share * w.strength)
    FROM ways AS w
    JOIN steps AS s ON s.graph_id = w.graph_id AND s.target = w.node
    LEFT JOIN recurring.ways AS known ON known.graph_id = s.graph_id AND known.node = s.source
    GROUP BY s.graph_id, s.source
    HAVING max(s.share * w.strength) > coalesce(max(known.strength), 0)
),
found AS (
    SELECT s.graph_id, max(w.strength) AS strength, arg_max(w.path, w.strength) AS path
    FROM starts AS s
    JOIN ways AS w ON w.graph_id = s.graph_id AND w.node = s.node
    WHERE len(w.path) > 1
    GROUP BY s.graph_id
),
texts AS (
    SELECT f.graph_id, string_agg(
        node_text(n.kind, n.word, n.token, n.label, n.layer, n.feature), ' → ' ORDER BY n.node) AS path
    FROM found AS f
    JOIN every AS n ON n.graph_id = f.graph_id AND list_contains(f.path, n.node)
    GROUP BY f.graph_id
)
SELECT
    g.graph_id, i.prompt, coalesce(n.token, '') AS answer, coalesce(f.strength, 0) AS strength,
    t.path, f.path AS nodes
FROM goals AS g
JOIN graphs AS i ON i.graph_id = g.graph_id
LEFT JOIN answers AS a ON a.graph_id = g.graph_id
LEFT JOIN every AS n ON n.graph_id = a.graph_id AND n.node = a.node
LEFT JOIN found AS f ON f.graph_id = g.graph_id
LEFT JOIN texts AS t ON t.graph_id = g.graph_id
ORDER BY strength DESC, g.graph_id;
