-- The part of a node's whole input that an edge brings: |weight| / input_size of the node, or / Σ|weight| of the edges
-- that it has (`kept`) where input_size is unknown.
-- Example: SELECT source, target, input_share(weight, sum(abs(weight)) OVER (PARTITION BY target), NULL) FROM edges
CREATE MACRO input_share(edge_weight, kept, whole) AS abs(edge_weight) / nullif(greatest(kept, whole), 0);
