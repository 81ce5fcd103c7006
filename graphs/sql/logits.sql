-- What is explained: rows of `nodes` of kind 'logit'.
-- Example: SELECT graph_id, token, probability FROM logits ORDER BY probability DESC
CREATE VIEW logits AS
SELECT graph_id, node, layer, position, feature, token_id, token, word, pre_activation, bias, remainder,
    input_size, probability, reached_from
FROM nodes
WHERE kind = 'logit';
