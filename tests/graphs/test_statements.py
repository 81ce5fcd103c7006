from graphs.statements import macro_description, macro_signature, macros


def test_every_macro_is_documented_by_its_leading_comment():
    found = macros()
    assert sorted(found) == [
        "best_paths", "common_features", "diff", "in_edges", "influence_by_kind", "input_share", "inputs_of",
        "node_text", "out_edges", "outputs_of", "paths", "paths_between", "strongest_circuit", "strongest_path",
    ]  # fmt: skip
    names = list(found)
    assert names.index("node_text") < names.index("best_paths") < names.index("strongest_path")
    for name, sql in found.items():
        assert macro_signature(name, sql).startswith(name + "(")
        assert macro_description(sql).endswith(".")
