-- The tokens of the prompts: rows of `nodes` of kind 'token'.
-- Example: SELECT word, count(*) AS graphs FROM tokens GROUP BY word ORDER BY graphs DESC
CREATE VIEW tokens AS
SELECT graph_id, node, position, token_id, token, word, influence, cumulative_influence, reaches_answer
FROM nodes
WHERE kind = 'token';
