from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.fx import GraphModule

from ptq4dit_ao.artifact import graph_from_json, graph_tensors, graph_to_json
from ptq4dit_ao.artifact.tests import models
from ptq4dit_ao.errors import ArtifactError

VARIANTS = ("float", "int8", "int4")
Damage = Callable[[dict[str, Any]], object]


def reloaded(gm: GraphModule, **kwargs: Any) -> GraphModule:
    doc = json.loads(json.dumps(graph_to_json(gm), allow_nan=False))
    return graph_from_json(doc, graph_tensors(gm), **kwargs)


def names(gm: GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes]


def node(doc: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in doc["nodes"] if entry["name"] == name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [models.EXPORTED_BATCH, 1, 5])
def test_a_dit_computes_the_same_bits(dits: dict[str, GraphModule], variant: str, batch: int) -> None:
    gm, args = dits[variant], models.dit_args(batch)
    assert torch.equal(reloaded(gm)(*args), gm(*args))


@pytest.mark.parametrize("variant", VARIANTS)
def test_node_names_are_kept(dits: dict[str, GraphModule], variant: str) -> None:
    gm = dits[variant]
    kept = [name for name in names(gm) if not name.startswith("_assert_tensor_metadata")]
    assert names(reloaded(gm)) == kept
    assert len(kept) > 100


def test_the_variants_are_what_they_claim(dits: dict[str, GraphModule]) -> None:
    outputs = {variant: dits[variant](*models.dit_args(2)) for variant in VARIANTS}
    assert not torch.equal(outputs["float"], outputs["int8"])
    assert not torch.equal(outputs["int4"], outputs["int8"])


def test_a_reloaded_dit_exports_again(dits: dict[str, GraphModule]) -> None:
    gm, args = reloaded(dits["int8"]), models.dit_args(3)
    batch = {0: Dim("batch", min=1, max=64)}
    again = torch.export.export(gm, models.dit_args(2), dynamic_shapes=(batch, batch, batch), strict=False).module()
    assert torch.equal(again(*args), gm(*args))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reloaded_dit_copies(dits: dict[str, GraphModule], variant: str) -> None:
    gm, args = reloaded(dits[variant]), models.dit_args(3)
    copied = copy.deepcopy(gm)
    assert names(copied) == names(gm)
    assert torch.equal(copied(*args), gm(*args))


def test_storing_leaves_the_graph_alone(dits: dict[str, GraphModule]) -> None:
    before = str(dits["int8"].graph)
    graph_to_json(dits["int8"])
    assert str(dits["int8"].graph) == before


def test_containers_keywords_and_none_come_back(small: GraphModule) -> None:
    args, kwargs = models.small_args(7)
    expected, found = small(*args, **kwargs), reloaded(small)(*args, **kwargs)
    assert list(found) == ["x", "rest"]
    assert type(found["rest"]) is tuple
    assert torch.equal(found["x"], expected["x"])
    assert torch.equal(found["rest"][0], expected["rest"][0])
    assert found["rest"][1] is None
    assert torch.equal(found["rest"][2][0], expected["rest"][2][0])


def test_guards_are_left_out() -> None:
    guarded = models.export_small(check_guards=True)
    assert "_guards_fn" in names(guarded)
    assert "_guards_fn" not in names(reloaded(guarded))


def test_tied_tensors_stay_one(small: GraphModule) -> None:
    linear = small.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
    with small.graph.inserting_before(linear):
        linear.args = (linear.args[0], small.graph.get_attr("layer.weight"), linear.args[2])
    small.recompile()
    assert graph_to_json(small)["aliases"] == {"layer.weight": "tied.weight"}
    assert "layer.weight" not in graph_tensors(small)
    back = reloaded(small)
    assert back.get_parameter("tied.weight") is back.get_parameter("layer.weight")
    args, kwargs = models.small_args()
    assert torch.equal(back(*args, **kwargs)["x"], small(*args, **kwargs)["x"])


def test_other_views_of_the_same_memory_are_not_tied(small: GraphModule) -> None:
    weight = small.get_parameter("tied.weight")
    small.get_submodule("blocks.a-b").weight = torch.nn.Parameter(weight.T)
    small.register_buffer("offset", weight.detach()[0])
    assert graph_to_json(small)["aliases"] == {}
    args, kwargs = models.small_args()
    assert torch.equal(reloaded(small)(*args, **kwargs)["x"], small(*args, **kwargs)["x"])


def test_constants_that_nothing_reads_are_left_out(small: GraphModule) -> None:
    assert {"layer_weight", "unused"} <= set(names(small))
    assert set(graph_tensors(small)) == {"tied.weight", "tied.bias", "offset", "blocks.a-b.weight", "blocks.a-b.bias"}
    assert not {"layer_weight", "unused"} & set(names(reloaded(small)))


def test_parameters_and_buffers_stay_what_they_are(small: GraphModule) -> None:
    back = reloaded(small)
    assert dict(back.named_buffers()).keys() == {"offset"}
    assert dict(back.named_parameters()).keys() == graph_tensors(small).keys() - {"offset"}
    assert not any(p.requires_grad for p in back.parameters())
    assert not back.training


def test_tensors_are_used_as_they_are(small: GraphModule) -> None:
    tensors = graph_tensors(small)
    back = graph_from_json(graph_to_json(small), tensors)
    assert back.get_parameter("tied.weight").data_ptr() == tensors["tied.weight"].data_ptr()


def test_a_name_that_shadows_a_builtin_is_kept(small: GraphModule) -> None:
    placeholder = small.graph.find_nodes(op="placeholder")[0]
    placeholder.name = "input"
    back = reloaded(small)
    assert names(back)[-1] == "output"
    assert "input" in names(back)
    args, kwargs = models.small_args()
    assert torch.equal(back(*args, **kwargs)["x"], small(*args, **kwargs)["x"])


def test_the_device_can_be_replaced(dits: dict[str, GraphModule]) -> None:
    tensors = {name: tensor.to("meta") for name, tensor in graph_tensors(dits["int8"]).items()}
    back = graph_from_json(graph_to_json(dits["int8"]), tensors, device=torch.device("meta"))
    assert back(*(arg.to("meta") for arg in models.dit_args(2))).shape == (2, 4, 8, 8)
    assert {n.kwargs["device"] for n in back.graph.nodes if "device" in n.kwargs} == {torch.device("meta")}


def test_a_graph_that_was_not_exported_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"has a CodeGen, not the signature of an exported model; capture"):
        graph_to_json(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)))


def test_an_output_class_is_refused_by_name() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    class Wrapped(models.Small):
        def forward(self, input: Any, extra: Any, *, scale: Any) -> Any:
            return BaseModelOutput(last_hidden_state=self.layer(input))

    with pytest.raises(ArtifactError, match=r"type BaseModelOutput cannot be stored; export the model so that it retu"):
        graph_to_json(models.export_small(Wrapped().eval()))


def test_a_no_grad_block_is_refused() -> None:
    class Gradless(models.Small):
        def forward(self, input: Any, extra: Any, *, scale: Any) -> Any:
            with torch.no_grad():
                x = self.layer(input)
            return x.requires_grad_(False) + 1

    with pytest.raises(ArtifactError, match=r"may not call 'wrap_with_set_grad_enabled', only .* \(no_grad blocks"):
        graph_to_json(models.export_small(Gradless().eval()))


def test_control_flow_is_refused() -> None:
    class Branching(models.Small):
        def forward(self, input: Any, extra: Any, *, scale: Any) -> Any:
            return torch.cond(input.sum() > 0, lambda v: v + 1, lambda v: v - 1, (input,))

    with pytest.raises(ArtifactError, match=r"may not call 'cond', only .* control flow included"):
        graph_to_json(models.export_small(Branching().eval()))


def test_modules_are_refused(small: GraphModule) -> None:
    small.add_submodule("observer", torch.nn.Identity())
    last = small.graph.find_nodes(op="output")[0]
    with small.graph.inserting_before(last):
        small.graph.call_module("observer", (last.prev,))
    with pytest.raises(
        ArtifactError, match=r"node 'observer': op 'call_module' \(target 'observer'\) cannot be stored"
    ):
        graph_to_json(small)


def test_other_calls_are_refused_with_their_node(small: GraphModule) -> None:
    last = small.graph.find_nodes(op="output")[0]
    with small.graph.inserting_before(last):
        small.graph.call_function(print, (last.prev,))
    with pytest.raises(ArtifactError, match=r"node 'print_1': a stored graph may not call 'print'"):
        graph_to_json(small)


@pytest.mark.parametrize("tensor", [torch.ones(4).to_sparse(), torch.ones(4, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_dense_values_are_refused(small: GraphModule, tensor: torch.Tensor) -> None:
    small.register_buffer("offset", tensor)
    with pytest.raises(ArtifactError, match=r"tensor 'offset' .* has no dense values to store; load the weights"):
        graph_tensors(small)


def test_tensor_subclasses_are_refused(small: GraphModule) -> None:
    class Odd(torch.Tensor):
        pass

    small.register_buffer("offset", torch.ones(4).as_subclass(Odd))
    with pytest.raises(
        ArtifactError, match=r"'offset' is a .*Odd, a stored graph refers to plain tensors only; export"
    ):
        graph_tensors(small)


INJECTION = "x): __import__('os').system('true') #"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "call": (lambda d: node(d, "linear").update(target="os.system"), r"node 'linear': .* may not call 'os.system'"),
    "file": (lambda d: node(d, "linear").update(target="aten.from_file.default"), r"may not call 'aten.from_file.defa"),
    "method": (
        lambda d: node(d, "linear").update(op="call_method", target="cpu"),
        r"op 'call_method' .* cannot be sto",
    ),
    "module": (
        lambda d: node(d, "linear").update(op="call_module", target="tied"),
        r"op 'call_module' .* cannot be st",
    ),
    "op": (lambda d: node(d, "linear").update(op=["x"]), r"node 'linear': op, target, args and kwargs are not"),
    "node name": (lambda d: node(d, "linear").update(name=INJECTION), r"node .* is not an identifier"),
    "input name": (lambda d: d["inputs"].__setitem__(0, INJECTION), r"input .* is not an identifier"),
    "keyword": (lambda d: d["in_spec"]["tuple"][1].update(dict={INJECTION: "*"}), r"input .* is not an identifier"),
    "kwarg": (lambda d: node(d, "linear")["kwargs"].update({INJECTION: 1}), r"keyword .* is not an identifier"),
    "placeholder": (lambda d: node(d, "extra_0").update(target=INJECTION), r"placeholder .* is not an identifier"),
    "tensor name": (lambda d: node(d, "offset").update(target='x")or(1'), r"tensor name .* is not a dotted path"),
    "forward": (lambda d: node(d, "offset").update(target="forward"), r"tensor name 'forward' is not a dotted path"),
    "other tensor": (lambda d: node(d, "offset").update(target="off"), r"weights lack off, other than the graph reads"),
    "spare tensor": (lambda d: d["nodes"].remove(node(d, "offset")), r"refers to node 'offset', which does not come"),
    "alias": (lambda d: d.update(aliases={"a": "b"}), r"aliases .* do not lead to stored tensors; save"),
    "alias type": (lambda d: d.update(aliases={"a": 1}), r"aliases is \[1\], not a list of strings"),
    "spare alias": (lambda d: d.update(aliases={"a": "offset"}), r"weights also hold a, other than the graph reads"),
    "parameter": (lambda d: d.update(parameters=["a"]), r"parameters \['a'\] are not among the weights; save"),
    "two names": (
        lambda d: node(d, "linear_1").update(name="linear"),
        r"two nodes are called 'linear'; save the model",
    ),
    "order": (lambda d: d["nodes"].reverse(), r"refers to node .*, which does not come before it"),
    "no output": (lambda d: d["nodes"].pop(), r"does not end in its only output node"),
    "dead end": (lambda d: d["nodes"].insert(0, {**d["nodes"][-1], "name": "o", "args": [1]}), r"its only output node"),
    "late": (
        lambda d: d["nodes"].append({**node(d, "offset"), "name": "late"}),
        r"does not end in its only output node",
    ),
    "outputs": (lambda d: d.update(out_spec="*"), r"the graph has 4 outputs where its signature has 1; save"),
    "output none": (lambda d: d["nodes"][-1].update(args=[]), r"output nodes take 1 arguments, found 0"),
    "inputs": (lambda d: d["in_spec"]["tuple"][0]["tuple"].append("*"), r"has 3 argument names where .* has 4"),
    "input leaves": (lambda d: d["in_spec"]["tuple"][0]["tuple"][1]["list"].pop(), r"has 3 inputs where .* has 2"),
    "args": (lambda d: d.update(in_spec={"list": []}), r"the inputs nest as .*, not as \(args, kwargs\)"),
    "output value": (lambda d: d["nodes"][-1].update(args=[1]), r"the graph has 0 outputs where its signature has 4"),
    "nodes": (lambda d: d.update(nodes={}), r"nodes is a dict, not a list"),
    "node": (lambda d: d["nodes"].insert(0, "x"), r"node is a str, not an object"),
    "node key": (
        lambda d: node(d, "linear").update(type="eval"),
        r"node has the unknown 'type'; it is damaged or of a",
    ),
    "node lacks": (lambda d: node(d, "linear").pop("args"), r"node lacks 'args'"),
    "default": (
        lambda d: node(d, "extra_0").update(args=["x: "]),
        r"node 'extra_0': placeholder nodes take 0 arguments, found 1 and 0 keywords; capture",
    ),
    "attribute": (
        lambda d: node(d, "offset").update(args=[1]),
        r"node 'offset': get_attr nodes take 0 arguments, found 1",
    ),
    "output keyword": (
        lambda d: d["nodes"][-1].update(kwargs={"a": 1}),
        r"output nodes take 1 arguments, found 1 and 1 key",
    ),
    "operands": (lambda d: node(d, "mul")["args"].pop(), r"torch.fx cannot build the graph \(.*\); copy or save"),
    "args type": (
        lambda d: node(d, "linear").update(args={}),
        r"node 'linear': op, target, args and kwargs are not str",
    ),
    "key": (lambda d: d.update(code="import os"), r"graph has the unknown 'code'; it is damaged or of a newer version"),
    "lacks": (lambda d: d.pop("nodes"), r"graph lacks 'nodes'; it is damaged"),
}


def test_a_default_value_is_refused(small: GraphModule) -> None:
    small.graph.find_nodes(op="placeholder")[0].args = (1,)
    with pytest.raises(ArtifactError, match=r"node 'input_1': placeholder nodes take 0 arguments, found 1"):
        graph_to_json(small)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_crafted_or_damaged_graph_is_refused(small: GraphModule, damage: str) -> None:
    change, message = DAMAGES[damage]
    doc, tensors = json.loads(json.dumps(graph_to_json(small))), graph_tensors(small)
    change(doc)
    with pytest.raises(ArtifactError, match=message):
        graph_from_json(doc, tensors)


def test_tensor_names_that_collide_are_refused() -> None:
    doc = {
        "inputs": [],
        "in_spec": {"tuple": [{"tuple": []}, {"dict": {}}]},
        "out_spec": {"tuple": ["*", "*"]},
        "nodes": [
            {"name": "a", "op": "get_attr", "target": "a", "args": [], "kwargs": {}},
            {"name": "b", "op": "get_attr", "target": "a.b", "args": [], "kwargs": {}},
            {
                "name": "output",
                "op": "output",
                "target": "output",
                "args": [{"tuple": [{"node": "a"}, {"node": "b"}]}],
                "kwargs": {},
            },
        ],
        "aliases": {},
        "parameters": [],
    }
    with pytest.raises(ArtifactError, match=r"tensor name 'a.b' is taken .*; save the model again"):
        graph_from_json(doc, {"a": torch.ones(1), "a.b": torch.ones(1)})
