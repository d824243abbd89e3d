"""Cases of sections 4 and 5.1 to 5.3: data bootstrapping, tools, retrieval, selection among samples, tree search."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.objectives import decoding, selection, textmatch
from posttrain.objectives import search as trees
from posttrain.objectives.cases.values import Outputs, Values, integers, number, tensor


def rouge_l(inputs: Values, params: Values) -> Outputs:
    split = (lambda text: text.split()) if inputs.get("tokenisation", "word") == "word" else list
    found = textmatch.rouge_l(split(inputs["new"]), split(inputs["existing"]))
    keep = found.f1 < number(params.get("threshold", 0.7))
    return {"lcs": found.lcs, "precision": found.precision, "recall": found.recall, "f1": found.f1, "keep_new": keep}


def toolformer_filter(inputs: Values, params: Values) -> Outputs:
    names = ("logp_with_result", "logp_no_call", "logp_call_no_result")
    found = decoding.toolformer_gain(*(tensor(inputs[name]) for name in names))
    return {
        "weights": found.weights_n,
        "L_plus": found.with_result,
        "L_empty": found.without_call,
        "L_call_no_result": found.without_result,
        "L_minus": found.baseline,
        "gain": found.gain,
        "keep": found.gain >= number(params.get("tau", 1.0)),
    }


def ast_match(inputs: Values, params: Values) -> Outputs:
    return {"verdicts": [textmatch.match_call(got, want, inputs["api_names"]).value for got, want in inputs["pairs"]]}


def dfsdt(inputs: Values, params: Values) -> Outputs:
    tree = {name: trees.CallNode(trees.NodeKind(node["type"]), tuple(node["children"])) for name, node in inputs["tree"].items()}
    root = next(iter(tree))
    walk = trees.depth_first(tree, root, params["max_nodes"], params["max_depth"])
    chain = trees.greedy_chain(tree, root, params["max_depth"])
    return {
        "visit_order": list(walk.visited),
        "answer_node": walk.answer,
        "greedy_chain": list(chain.visited),
        "greedy_succeeds": chain.answer is not None,
    }


def constrained_step(inputs: Values, params: Values) -> Outputs:
    logits = tensor(inputs["logits"])
    allowed = torch.zeros(len(logits), dtype=torch.bool)
    allowed[integers(inputs["allowed"])] = True
    probs, log_mass = decoding.constrained_step(logits, allowed, number(params.get("temperature", 1.0)))
    return {"probs": probs, "legal_mass": log_mass.exp(), "log_legal_mass": log_mass}


def constrained_sequence(inputs: Values, params: Values) -> Outputs:
    found = decoding.constrained_sequence(inputs["first"], inputs["second"], inputs["legal"])
    return {"prob_of_legal_set": found.legal_mass, "exact_conditional": found.exact, "token_mask_distribution": found.masked}


def rag(inputs: Values, params: Values) -> Outputs:
    docs, tokens = tensor(inputs["doc_probs"]).log(), tensor(inputs["token_probs"]).log()
    sequence, token = decoding.rag_sequence(docs, tokens), decoding.rag_token(docs, tokens)
    return {"rag_sequence": sequence.exp(), "rag_token": token.exp(), "nll_sequence": -sequence, "nll_token": -token}


def prm_aggregate(inputs: Values, params: Values) -> Outputs:
    found = selection.aggregate_steps([number(score) for score in inputs["step_scores"]])
    return {
        "min": found.minimum,
        "prod": found.product,
        "log_prod": found.log_product,
        "last": found.last,
        "mean": found.mean,
        "sum": found.total,
    }


def prm_ce(inputs: Values, params: Values) -> Outputs:
    loss, metrics = selection.process_ce(tensor(inputs["logits"]), integers(inputs["labels"]))
    return {"loss": loss, "n_steps": metrics["steps"]}


def math_shepherd(inputs: Values, params: Values) -> Outputs:
    hard, soft = selection.rollout_labels(inputs["rollout_correct_per_step"])
    return {"hard": hard, "soft": soft}


def best_of_n_select(inputs: Values, params: Values) -> Outputs:
    answers = inputs["answers"]
    found = selection.best_of_n_select([number(score) for score in inputs["scores"]], answers)
    return {
        "best_index": found.best_index,
        "best_answer": None if found.best_index is None else answers[found.best_index],
        "weighted_vote": found.weighted_vote,
        "weighted_totals": {str(answer): total for answer, total in found.weighted_totals.items()},
        "majority": found.majority,
    }


def pass_at_k(inputs: Values, params: Values) -> Outputs:
    n, c, k = inputs["n"], inputs["c"], inputs["k"]
    return {"unbiased": selection.pass_at_k(n, c, k), "plug_in_biased": selection.best_of_k_prob(c / n, k)}


def best_of_k_prob(inputs: Values, params: Values) -> Outputs:
    return {
        "prob": selection.best_of_k_prob(number(inputs["p"]), inputs["K"]),
        "bon_kl_bound": selection.best_of_n_kl_bound(inputs["K"]),
    }


def star_filter(inputs: Values, params: Values) -> Outputs:
    attempts = [_attempt(problem) for problem in inputs["problems"]]
    direct, rationalised = selection.star_filter(attempts)
    kept = selection.rest_em(attempts, params.get("per_problem_cap", 10))
    return {"star_direct": direct, "star_rationalised": rationalised, "rest_em_kept": [list(pair) for pair in kept]}


def _attempt(problem: Values) -> selection.Attempt:
    def right(answer: Any) -> bool:
        return bool(answer is not None and answer["answer"] == problem["gold"])

    hinted = problem.get("hinted")
    return selection.Attempt(
        id=problem["id"],
        direct_correct=right(problem.get("direct")),
        hinted_correct=None if hinted is None else right(hinted),
        samples=tuple((right(sample), sample["text"]) for sample in problem.get("samples") or ()),
    )


def rest_mcts_value(inputs: Values, params: Values) -> Outputs:
    weights, values = trees.quality_values([(number(m), number(e)) for m, e in inputs["steps_m_and_error"]])
    return {"weighted_rewards": weights, "values": values}


def rest_mcts_uct(inputs: Values, params: Values) -> Outputs:
    children = [(number(value), int(visits)) for value, visits in inputs["children_V_n"]]
    scores = trees.uct_scores(children, inputs["parent_visits"], number(params.get("c", 0.7)), number(params.get("inf", 1.0)))
    out: Outputs = {"scores": scores, "pick": scores.index(max(scores)), "backprop_parent_value": trees.backed_up_value(children)}
    if inputs.get("blend_node") is not None:
        value = children[inputs["blend_node"]][0]
        out["rollout_blend"] = trees.blended_value(value, number(inputs["rollout_best"]), number(params.get("alpha", 0.5)))
    return out
