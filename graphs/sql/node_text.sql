-- A node in words, as paths show it: "Dallas", "Texas (L2 Dallas)", "L1/f3 (in)" or "error (L0 is)".
-- Example: SELECT node, node_text(kind, word, token, label, layer, feature) AS text FROM nodes LIMIT 5
CREATE MACRO node_text(node_kind, node_word, node_token, node_label, node_layer, node_feature) AS
CASE
    WHEN node_kind IN ('token', 'logit') THEN coalesce(node_word, trim(node_token))
    WHEN node_kind = 'error' THEN format('error (L{} {})', node_layer, trim(node_token))
    WHEN node_label IS NULL THEN format('L{}/f{} ({})', node_layer, node_feature, trim(node_token))
    ELSE format('{} (L{} {})', node_label, node_layer, trim(node_token))
END;
