"""Who trains, who validates, who tests, and which client owns what: index arrays, nothing else.

Everything here depends on (labels, names, digests, seed) alone: no image, no model, no file order
beyond that of the data set. Every function returns sorted int64 arrays, so that a part is a set.
"""

from checks import InputError, warn

import math
import re

import numpy as np
import torch

SPLITS = ("random", "stratified", "stratified80", "grouped", "blocked")
FOLDS = ("stratified", "random", "grouped", "blocked")  # of k-fold cross-validation
PARTITIONS = ("iid", "dirichlet", "dirichlet-equal", "shards")
EMBARGO = 30  # files dropped at each boundary of a blocked split: neighbours share a field of view
RETRIES = 1000

Split = dict[str, np.ndarray]  # "train", "val", "test": sorted int64 indices


def make_split(kind: str, labels: np.ndarray, seed: int, *, paths: list[str] | None = None,
               groups: list[str] | None = None) -> Split:
    """Train, validation and test indices of n images.
    labels: int64 [n]. paths: needed by `blocked` (file-number order). groups: needed by `grouped`,
    one id per image. Raises InputError where a part, or a class of the training part, is empty.
    `random` is `torch.utils.data.random_split` with lengths n-2⌊n/10⌋, ⌊n/10⌋, ⌊n/10⌋: with seed 42
    on the 3,256 images it has the paper's class counts (section 3.6, test 59/98/84/84)."""
    n, tenth = len(labels), len(labels) // 10
    if tenth == 0:
        raise InputError(f"{n} images are too few for an 80/10/10 split: at least 10 are needed")
    if kind == "random":
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
        train, val, test = np.split(order, [n - 2 * tenth, n - tenth])
    elif kind == "stratified":
        rest, test = _stratified(np.arange(n), labels, tenth, seed)
        train, val = _stratified(rest, labels, tenth, seed)
    elif kind == "stratified80":  # Table 1: validation = test, so selection sees the test part
        train, test = _stratified(np.arange(n), labels, 0.2, seed)
        val = test
    elif kind == "grouped":
        test, val, train = _take_groups(np.arange(n), groups, [tenth, tenth], seed)
    elif kind == "blocked":
        return _blocked(labels, paths)
    split = {"train": train, "val": val, "test": test}
    for name, part in split.items():
        if len(part) == 0:  # of whole groups alone
            sizes = np.unique(groups, return_counts=True)[1]
            raise InputError(f"the grouped split leaves the {name} part empty: of {len(sizes)} "
                             f"groups the smallest has {min(sizes)} images, and a part holds at "
                             f"most {tenth}; more groups are needed, or smaller ones")
    return {name: np.sort(part).astype(np.int64) for name, part in split.items()}


def _stratified(indices: np.ndarray, labels: np.ndarray | None, size: float, seed: int):
    """The rest, and a part of this size or share; without labels it is drawn at random, with them
    it has at least as many images as there are classes."""
    from sklearn.model_selection import train_test_split  # here: most runs need none
    if labels is not None:
        labels, size = labels[indices], math.ceil(size * len(indices)) if size < 1 else size
        size = max(size, len(set(labels)))
    try:
        return train_test_split(indices, test_size=size, random_state=seed, stratify=labels)
    except ValueError as error:
        raise InputError(f"a class is too small for a stratified split: {error}") from None


def _take_groups(indices: np.ndarray, groups: list, sizes: list[int],
                 seed: int) -> list[np.ndarray]:
    """Deal whole groups in random order, each to the first part with room; the rest is the last.
    groups: one id per image of the whole set."""
    members: dict[str, list[int]] = {}
    for index in indices:
        members.setdefault(groups[index], []).append(index)
    several = list(members.values())
    parts: list[list[int]] = [[] for _ in (*sizes, None)]
    for i in np.random.default_rng(seed).permutation(len(several)):
        room = (p for p, size in zip(parts, sizes) if len(p) + len(several[i]) <= size)
        next(room, parts[-1]).extend(several[i])
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def file_number(path: str) -> tuple:
    """Sort key: the numbers of a file name in order, then the path ("Snap_001 (3)": 1, 3)."""
    return [int(d) for d in re.findall(r"\d+", path.rsplit("/", 1)[-1].rsplit(".", 1)[0])], path


def _blocked(labels: np.ndarray, paths: list[str], folds: int | None = None, k: int = 0,
             inner_val: float = 0.1) -> Split:
    """Of each class, in the order of file numbers, the last 10 % are the test part, or the k-th of
    `folds` stretches. The files after it, then those from the beginning, train; the last of these
    validate: 10 % of the class, or `inner_val` of what a fold leaves. 30 are dropped between."""
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for c in np.unique(labels):
        order = sorted(np.flatnonzero(labels == c), key=lambda i: file_number(paths[i]))
        n, tenth = len(order), len(order) // 10
        start, end = (n - tenth, n) if folds is None else (round(j * n / folds) for j in (k, k + 1))
        rest = order[end + EMBARGO:] + order[:max(start - EMBARGO, 0)]
        val = tenth if folds is None else round(inner_val * len(rest))
        train = len(rest) - (val + EMBARGO if val else 0)
        if train <= 0:
            raise InputError(f"class number {c} has {n} images, too few for "
                             f"{'a blocked split' if folds is None else f'{folds} blocked folds'} "
                             f"with {EMBARGO} files dropped at each boundary")
        parts["train"] += rest[:train]
        parts["val"] += rest[len(rest) - val:]
        parts["test"] += order[start:end]
    if folds is not None and inner_val and not parts["val"]:
        raise InputError(f"--inner-val {inner_val:g} leaves a blocked fold without validation")
    return {name: np.sort(np.array(part, dtype=np.int64)) for name, part in parts.items()}


def make_folds(kind: str, labels: np.ndarray, folds: int, seed: int, *, inner_val: float = 0.1,
               paths: list[str] | None = None, groups: list[str] | None = None) -> list[Split]:
    """K-fold cross-validation (section 3.5): K splits whose test parts are disjoint and cover all.
    `val` is the share `inner_val` of what a fold leaves for training, taken in the manner of the
    folds and never from its test part; empty where inner_val is 0. `grouped`: StratifiedGroupKFold
    over `groups`, which stay whole. `blocked`: stretches of file numbers, by `_blocked`. Raises
    InputError for more folds than a class has images (or groups), and for parts without images."""
    if kind not in FOLDS:
        raise InputError(f"--split {kind} knows no folds; one of {', '.join(FOLDS)}")
    units = (np.unique(groups, return_inverse=True)[1] if kind == "grouped"
             else np.arange(len(labels)))  # what may not be cut
    for c in np.unique(labels):
        available = len(np.unique(units[labels == c]))
        if available < folds:
            raise InputError(f"{folds} folds are more than the {available} "
                             f"{'groups' if kind == 'grouped' else 'images'} of class number {c}")
    if kind == "blocked":
        return [_blocked(labels, paths, folds, k, inner_val) for k in range(folds)]
    from sklearn import model_selection
    family = {"random": model_selection.KFold, "stratified": model_selection.StratifiedKFold,
              "grouped": model_selection.StratifiedGroupKFold}[kind]
    splitter = family(folds, shuffle=True, random_state=seed)
    out = []
    for rest, test in splitter.split(labels, labels, units if kind == "grouped" else None):
        if inner_val == 0:
            train, val = rest, rest[:0]
        elif kind == "grouped":
            val, train = _take_groups(rest, units, [round(inner_val * len(rest))], seed)
        else:
            train, val = _stratified(rest, labels if kind == "stratified" else None, inner_val,
                                     seed)
        out.append({"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)})
    if inner_val and not all(len(fold["val"]) for fold in out):
        raise InputError(f"--inner-val {inner_val:g} leaves a fold without a validation image: "
                         f"{'no group is so small' if kind == 'grouped' else 'too few images'}")
    return out


def given(words: np.ndarray, labels: np.ndarray, seed: int, groups: list | None = None) -> Split:
    """The split whose parts are named, str [n]: train, val, test, dropped or val+test. Where none
    is val, a tenth of the training part validates: stratified, or whole groups where they are
    known, one id an image. InputError without a training or a test part, or for images in none."""
    split = {part: np.flatnonzero([part in word.split("+") for word in words.tolist()])
             for part in ("train", "val", "test")}
    if (words == "").any():
        raise InputError(f"{(words == '').sum()} image(s) are in no part of the given split")
    for part in ("train", "test"):
        if len(split[part]) == 0:
            raise InputError(f"the given split has no {part} part; give one, or name another split "
                             "(--split random, stratified or grouped) for all images")
    if len(split["val"]) == 0:
        rest, tenth = split["train"], len(split["train"]) // 10
        if groups is None:
            split["train"], split["val"] = map(np.sort, _stratified(rest, labels, tenth or 1, seed))
        else:
            smallest = np.unique(np.asarray(groups)[rest], return_counts=True)[1].min()
            split["val"], split["train"] = _take_groups(rest, groups, [max(tenth, smallest)], seed)
        warn(f"note: the given split has no val part: {len(split['val'])} images of its training "
             f"part validate, {'stratified' if groups is None else 'whole groups'}")
    return split


def numbered(values: np.ndarray) -> np.ndarray:
    """int64 [n]: equal numbers for equal values, and a number of its own for each "" (unknown)."""
    numbers = np.unique(values, return_inverse=True)[1]
    unknown = np.flatnonzero(values == "")
    numbers[unknown] = len(values) + np.arange(len(unknown))
    return np.unique(numbers, return_inverse=True)[1]


def group(n: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """int [n]: connected components of the pairs, each named by its first member."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    ends = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(ends.shape[1]), tuple(ends)), shape=(n, n))
    component = connected_components(graph, directed=False)[1]
    return np.unique(component, return_index=True)[1][component]


def joined(several: list[np.ndarray]) -> np.ndarray:
    """int64 [n]: equal numbers for images that any of these, int64 [n], joins, directly or not."""
    n = len(several[0])  # each number is a node behind the images, and a pair with its images
    pairs = [(i, n * (1 + k) + number) for k, numbers in enumerate(several)
             for i, number in enumerate(numbers.tolist())]
    return group(n * (1 + len(several)), pairs)[:n]


def by_name(name: str) -> tuple:
    """Sort key of names: numbers as numbers, before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def owned(names: np.ndarray, split: Split) -> dict[str, np.ndarray]:
    """The clients that a column names, str [n]: name → its training images, in order of the names.
    Raises InputError for training images of no client, and for a client without any."""
    own = names[split["train"]]
    if (own == "").any():
        raise InputError(f"the column client is empty for {(own == '').sum()} training image(s)")
    present = sorted(set(own.tolist()), key=by_name)
    if without := sorted(set(names.tolist()) - {"", *present}, key=by_name):
        raise InputError(f"client {without[0]} of the column client has no training image")
    return {name: split["train"][own == name] for name in present}


def count_twins(digests: list[str], part: np.ndarray, train: np.ndarray) -> int:
    """How many images of `part` have an image with equal decoded pixels in `train`."""
    known = {digests[i] for i in train}
    return sum(digests[i] in known for i in part)


def partition(kind: str, labels: np.ndarray, train: np.ndarray, clients: int, seed: int, *,
              alpha: float = 0.3, classes_per_client: int = 2) -> list[np.ndarray]:
    """Deal the training part to `clients` clients: disjoint, complete, none empty.

    labels: int64 [n] of the whole set; train: indices into it. `iid`: equal shuffled parts, the
    remainder to the last (section 3.6; 651/651/651/653). `dirichlet`: each class dealt by
    Dir(alpha) over clients (Yurochkin et al. 2019, arXiv 1905.12022), redrawn until none is empty.
    `dirichlet-equal`: sizes as iid, each client's class mix drawn from Dir(alpha) (Hsu et al. 2019,
    arXiv 1909.06335, from equal class shares). `shards`: every client holds exactly
    `classes_per_client` classes. InputError where that cannot be done."""
    if clients > len(train):
        raise InputError(f"{clients} clients are more than the {len(train)} training images")
    rng = np.random.default_rng([seed, PARTITIONS.index(kind)])
    if kind == "iid":
        size = len(train) // clients
        parts = np.split(rng.permutation(train), [size * k for k in range(1, clients)])
    elif kind == "dirichlet":
        for _ in range(RETRIES):
            fractions = rng.dirichlet([alpha] * clients, size=int(labels.max()) + 1)  # [C, K]
            parts = deal(labels, train, fractions, rng)
            if min(map(len, parts)) > 0:
                break
        else:
            raise InputError(f"no Dirichlet({alpha:g}) partition of {len(train)} images over "
                             f"{clients} clients without an empty one in {RETRIES} draws")
    elif kind == "dirichlet-equal":
        parts = _equal_sizes(labels, train, clients, alpha, rng)
    else:
        parts = deal(labels, train, _shards(labels[train], clients, classes_per_client, rng), rng)
        if min(len(np.unique(labels[part])) for part in parts) < classes_per_client:
            raise InputError(f"{clients} clients are too many: a class has fewer images than "
                             "owners")
    return [np.sort(part).astype(np.int64) for part in parts]


def stain_owners(colour: np.ndarray, labels: np.ndarray, paths: list[str], train: np.ndarray,
                 clients: int) -> np.ndarray:
    """The client of every image, int64 [n], where clients differ by stain but not by class.
    colour: statistics [n, d] of each image. They are standardised over the training part, each
    class's mean is taken off, and images are ordered by the first principal component, its largest
    loading positive: within each class, training images in `clients` equal slices (ties by path).
    Other images fall into the slice of their class that their own value lies in."""
    def spread(x: np.ndarray) -> np.ndarray:
        return (x - x[train].mean(0)) / np.where(x[train].std(0) > 0, x[train].std(0), 1)
    values = spread(colour.astype(float))
    for c in np.unique(labels[train]):
        values[labels == c] -= values[train[labels[train] == c]].mean(0)
    axis = np.linalg.svd(values[train], full_matrices=False)[2][0]
    score = values @ (axis * np.sign(axis[np.abs(axis).argmax()]))
    owner = np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels[train]):
        own = sorted(train[labels[train] == c].tolist(), key=lambda i: (score[i], paths[i]))
        slices = np.array_split(np.array(own), clients)
        cuts = [score[part[-1]] for part in slices[:-1] if len(part)]
        owner[labels == c] = np.searchsorted(cuts, score[labels == c])
        for k, part in enumerate(slices):
            owner[part] = k
    return owner


def deal(labels: np.ndarray, indices: np.ndarray, fractions: np.ndarray,
         rng: np.random.Generator) -> list[np.ndarray]:
    """Deal `indices` class by class, client k getting the share fractions[c, k] of class c.
    fractions: [classes, clients], rows in any scale. Every index goes to exactly one client."""
    parts: list[list[int]] = [[] for _ in range(fractions.shape[1])]
    for c in np.unique(labels[indices]):
        members = rng.permutation(indices[labels[indices] == c])
        edges = np.round(np.cumsum(fractions[c]) / fractions[c].sum() * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, edges[:-1]), strict=True):
            part.extend(piece)
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def _shards(labels: np.ndarray, clients: int, per_client: int, rng: np.random.Generator):
    """Who owns which class, 0 or 1, [C, K]: `per_client` neighbours in a random circle of them."""
    present = np.unique(labels)
    if not per_client <= len(present) <= clients * per_client:
        raise InputError(f"{clients} clients of {per_client} classes each do not fit "
                         f"{len(present)} classes")
    circle = rng.permutation(present)
    owners = np.zeros((labels.max() + 1, clients))
    for k in range(clients):
        owners[circle[(k * per_client + np.arange(per_client)) % len(circle)], k] = 1
    return owners


def _equal_sizes(labels: np.ndarray, train: np.ndarray, clients: int, alpha: float,
                 rng: np.random.Generator) -> list[list[int]]:
    """Clients of equal size: again and again a random client that has room draws one image, of a
    class that it draws from its own Dirichlet mix."""
    present = np.unique(labels[train])
    pools = [list(rng.permutation(train[labels[train] == c])) for c in present]
    mixes = np.maximum(rng.dirichlet([alpha] * len(present), size=clients), 1e-12)  # [K, C]
    slots = np.minimum(np.arange(len(train)) // (len(train) // clients), clients - 1)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for k in rng.permutation(slots):
        weights = mixes[k] * [len(pool) > 0 for pool in pools]
        parts[k].append(pools[rng.choice(len(pools), p=weights / weights.sum())].pop())
    return parts
