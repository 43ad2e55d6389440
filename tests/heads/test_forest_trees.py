"""Forest R-CNN's trees: k-means against its definition, descriptions of classes by the slow way, files, mistakes."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from loce.checkpoint.load import FORMAT, load_model, stats_to_dict
from loce.config import Config, HeadConfig, load_config, to_dict
from loce.data.build import train_annotations
from loce.data.dataset import TrainDataset
from loce.data.glyphs.make import GlyphOptions, make_glyphs
from loce.engine.forest_building import build_trees, class_features, class_shapes, cluster, lexical_tree, shape_of
from loce.heads.forest_trees import k_means, read_trees, write_trees
from loce.models.build import build_model, head_files, load_head_files
from loce.models.roi_heads import pool
from loce.utils.errors import UserError
from tests.tiny_runs import CONFIG, run

NAMES = ("a", "b", "c", "d")


def cost(points, owner):
    """Sum of squared distances to the means of the clusters."""
    total = 0.0
    for cluster_ in set(owner.tolist()):
        own = points[owner == cluster_]
        total += ((own - own.mean(axis=0)) ** 2).sum()
    return total


@pytest.mark.parametrize("seed", range(4))
def test_k_means_finds_heaps(seed):
    rng = np.random.default_rng(seed)
    heap = rng.permutation(np.repeat(np.arange(6), 9))
    points = 50 * rng.standard_normal((6, 3))[heap] + rng.standard_normal((54, 3))
    owner = k_means(points, 6, seed)
    for mine in range(6):
        assert len(set(heap[owner == mine])) == 1
    _, first = np.unique(owner, return_index=True)
    assert (np.diff(first) > 0).all()  # numbered in the order of their first point
    np.testing.assert_array_equal(owner, k_means(points, 6, seed))


@pytest.mark.parametrize("clusters", [1, 4, 30])
def test_k_means_ends_where_no_point_is_nearer_to_another_mean(clusters):
    points = np.random.default_rng(0).standard_normal((30, 5))
    owner = k_means(points, clusters, 0)
    assert set(owner) == set(range(clusters))
    means = [points[owner == c].mean(axis=0) for c in range(clusters)]
    for point, own in zip(points, owner, strict=True):
        distances = [math.dist(point, mean) for mean in means]
        assert distances[own] == pytest.approx(min(distances), abs=1e-12)
    rng = np.random.default_rng(1)
    assert all(cost(points, owner) <= cost(points, rng.integers(clusters, size=30)) for _ in range(200))


def test_k_means_of_points_that_are_alike():
    assert sorted(k_means(np.ones((5, 2)), 5, 0).tolist()) == list(range(5))
    with pytest.raises(ValueError, match="6 clusters of 5 points"):
        k_means(np.ones((5, 2)), 6, 0)


def test_a_class_without_instances_joins_the_middle():
    means = np.array([[0.0], [1.0], [np.nan], [9.0], [9.5], [4.8]])
    tree = cluster(means, 3, 0)
    assert tree[0] == tree[1] and tree[3] == tree[4] and len(set(tree.tolist())) == 3
    assert tree[2] == tree[5]  # the mean of all is 4.86


def test_a_shape_is_the_covered_share_of_each_cell():
    bits = (np.random.default_rng(0).random((13, 5)) < 0.5).astype(np.uint8)
    found = shape_of(bits)
    fine = np.kron(bits, np.ones((8, 8)))  # 104 x 40 points: cells of 13 x 5
    for y in range(8):
        for x in range(8):
            share = fine[13 * y : 13 * y + 13, 5 * x : 5 * x + 5].mean()
            assert found[8 * y + x] == pytest.approx(share / 8, abs=1e-12)
    assert found[64] == pytest.approx(math.log2(5 / 13))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Data, a recipe with trees, and a detector to take features of."""
    folder = tmp_path_factory.mktemp("forest")
    sizes = {"classes": 6, "train_images": 16, "val_images": 6, "size": 64, "smallest": 0.26, "largest": 0.4}
    make_glyphs(GlyphOptions(out=str(folder), workers=1, **sizes))
    (folder / "plain.yaml").write_text(CONFIG.format(folder))
    head = f"head: {{name: forest, forest: {{trees: {folder}/made/forest.json, visual: 2, geometrical: 3}}}}\n"
    (folder / "forest.yaml").write_text(CONFIG.format(folder) + head)
    config = load_config([str(folder / "plain.yaml")])
    stats = train_annotations(config).stats
    torch.manual_seed(0)
    content = {
        "format": FORMAT,
        "config": to_dict(config),
        "classes": stats_to_dict(stats),
        "model": build_model(config, stats).state_dict(),
    }
    torch.save(content, folder / "stage1.pt")
    return folder


def opened(recipe, *words) -> tuple[Config, object]:
    config = load_config([str(recipe / "forest.yaml"), *words])
    return config, train_annotations(config)


def test_features_of_classes_by_the_slow_way(recipe):
    config, annotations = opened(recipe)
    model = load_model(recipe / "stage1.pt")
    found = class_features(model, config, annotations, 100)
    still = dataclasses.replace(config.data, short_edges=(64,), flip=0.0)
    dataset = TrainDataset(annotations, recipe, still, 0)
    rows = {}
    for index in annotations.train_images.tolist():
        sample = dataset[index, 0]
        with torch.no_grad():
            features = model.features(model.batch_images([sample["image"]])[0])
            x = model.roi_heads.box_head(pool(features, [sample["boxes"]], 7, config.model.roi.finest_scale))
        for label in set(sample["labels"].tolist()):
            rows.setdefault(label, []).append(x[sample["labels"] == label])
    for label, own in rows.items():
        alone = [each for each in own if len(each) == 1]  # of several instances in an image one is drawn
        if len(alone) == len(own):
            np.testing.assert_allclose(found[label], torch.cat(own).mean(dim=0).numpy(), rtol=1e-4, atol=1e-5)
        else:
            low, high = (sum(getattr(each, f)(dim=0) for each in own) / len(own) for f in ("amin", "amax"))
            assert (found[label] >= low.numpy() - 1e-5).all() and (found[label] <= high.numpy() + 1e-5).all()
    assert any(len(own) == sum(len(each) for each in own) for own in rows.values())


def test_trees_are_built_read_and_planted(recipe):
    config, annotations = opened(recipe)
    assert build_trees(config, str(recipe / "stage1.pt"), "", 20, torch.device("cpu")) == {
        "visual": 2,
        "geometrical": 3,
    }
    trees = head_files(config, annotations)
    np.testing.assert_array_equal(trees["tree_geometrical"], cluster(class_shapes(annotations, 20, config.seed), 3, 0))
    model = build_model(config, annotations.stats)
    load_head_files(config, annotations, model)
    for name, tree in trees.items():
        np.testing.assert_array_equal(model.roi_heads.classifier.get_buffer(name), tree)
    (recipe / "made/forest.json").unlink()


def test_mistakes_of_who_builds_are_told_together(recipe):
    config, _ = opened(recipe, "head.forest.visual=7", "head.forest.lexical=2")
    with pytest.raises(
        UserError, match=r"(?s)checkpoint: must name.*lexical: must name.*visual = 7: more parents than"
    ):
        build_trees(config, "", "", 20, torch.device("cpu"))
    with pytest.raises(UserError, match=r"only head\.name=forest has trees"):
        build_trees(dataclasses.replace(config, head=HeadConfig()), "", "", 20, torch.device("cpu"))


def test_a_file_must_fit_the_data_and_the_options(tmp_path):
    data = tmp_path / "train.json"
    data.write_text("{}")
    file = tmp_path / "forest.json"
    tree = np.array([0, 1, 1, 0])
    with pytest.raises(UserError, match="there is no such file; build it"):
        read_trees(file, data, NAMES, {"visual": 2})
    write_trees(file, data, NAMES, {"visual": tree}, {"visual": "by hand"})
    np.testing.assert_array_equal(read_trees(file, data, NAMES, {"visual": 2})["visual"], tree)
    for size, names, content, complaint in (
        ({"visual": 3}, NAMES, "{}", "visual tree has 2 parents, head.forest.visual says 3"),
        ({"lexical": 2}, NAMES, "{}", "has no lexical tree, only visual"),
        ({"visual": 2}, NAMES[:3], "{}", "its 4 classes are not the 3 of the training data"),
        ({"visual": 2}, NAMES, "{ }", "whose content is not that of"),
    ):
        data.write_text(content)
        with pytest.raises(UserError, match=rf"(?s){complaint}.*build them anew"):
            read_trees(file, data, names, size)
    for text in ("[]", "{", '{"format": 2}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"cannot be read|is no file of scripts/build_forest\.py"):
            read_trees(file, data, NAMES, {"visual": 2})


def test_a_lexical_tree_comes_from_the_user(tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"c": "animal", "b": "tool", "a": "animal", "d": "tool"}))
    assert lexical_tree(file, NAMES, 2).tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"has 2 parents, head\.forest\.lexical says 3"):
        lexical_tree(file, NAMES, 3)
    file.write_text(json.dumps({"c": "animal", "x": "tool"}))
    with pytest.raises(UserError, match=r"(?s)3 without a parent: a, b, d.*1 unknown: x"):
        lexical_tree(file, NAMES, 1)
    for text in ('["a"]', '{"a": 1}', "{"):
        file.write_text(text)
        with pytest.raises(UserError, match="lexical = "):
            lexical_tree(file, NAMES, 1)


@pytest.mark.slow
def test_from_the_shell(recipe, tmp_path):
    """Build, train, go on and evaluate: the trees are read when training starts, later they are in the checkpoint."""
    trees, forest = recipe / "made/forest.json", recipe / "forest.yaml"
    words = (forest, f"output={tmp_path / 'run'}", "train.epochs=1", "train.drops=[]", "train.evaluate=false")
    assert "there is no such file; build it" in run("train.py", *words, code=2)
    build_words = (f"config={forest}", f"checkpoint={recipe / 'stage1.pt'}")
    assert "visual tree with 2 parents, geometrical tree with 3 parents" in run("build_forest.py", *build_words)
    assert "is there already" in run("build_forest.py", *build_words, code=2)
    run("train.py", *words)
    trees.rename(tmp_path / "moved.json")
    assert "training is finished already" in run("train.py", *words)
    run("evaluate.py", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'eval'}")
