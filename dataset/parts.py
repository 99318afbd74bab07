"""Which images train, validate and test, and which client owns which: what flags and table say."""

from checks import InputError, integer, number, warn

import argparse
from collections import Counter

import numpy as np

from dataset import splits
from dataset.images import UNITS, Images, colour_statistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the split."""
    add = parser.add_argument_group("split").add_argument
    add("--split", choices=(*splits.SPLITS, "given"), help="default: given where table or folders "
        "give one, grouped where patients or groups are known, else random 80/10/10 (stratified "
        "folds); grouped without a table: identical images stay together")
    add("--split-seed", type=integer(0), default=42, help="seed of split and partition")


def add_fold_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of cross-validation; a trainer sets the default of --folds."""
    add = parser.add_argument_group("folds").add_argument
    add("--folds", type=integer(1), help="k-fold cross-validation (default: federated 1, central "
        "5); 1 = one run on the given --split")
    add("--inner-val", type=number(0, 0.5), default=0.1, help="share of a fold's training part "
        "that validates; 0 = no validation, the last model is scored")


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that deal the training part to clients."""
    add = parser.add_argument_group("clients").add_argument
    add("--clients", type=integer(1), help="number of hospitals (default 4, or as the table says)")
    add("--partition", choices=(*splits.PARTITIONS, "stain", "given"),
        help="default: given where the table has a column client, else iid, equal sizes")
    add("--alpha", type=number(0, open_low=True), default=0.3, help="of the Dirichlet partitions")
    add("--classes-per-client", type=integer(1), default=2, help="of --partition shards")


def settle(args: argparse.Namespace, images: Images) -> None:
    """Decide what --split, --partition and --clients are where they were not given: a column of
    the table (or a tree that is split already) is used unless a flag says otherwise, and one line
    says what is. Changes `args`; columns that are not used leave `images.known`."""
    known, folds = images.known, getattr(args, "folds", 1)
    args.split = args.split or ("given" if "split" in known and folds == 1 else
                                "grouped" if known.keys() & set(UNITS) else
                                "random" if folds == 1 else "stratified")
    if "clients" in args:
        args.partition = args.partition or ("given" if "client" in known else "iid")
    use = {"split": args.split == "given", "client": getattr(args, "partition", "") == "given"}
    said = [f"{c} {'used' if use.get(c, c in UNITS) else 'not used'}" for c in known]
    for column, flag in (("split", "--split"), ("client", "--partition")):
        if not use[column]:
            known.pop(column, None)
        elif column not in known:
            raise InputError(f"{flag} given: neither table nor folders have a column {column}")
    if said:
        print(f"given with the images: {', '.join(said)}; --split {args.split}"
              + (f", --partition {args.partition}" if "clients" in args else ""))
    if "clients" in args:
        count = len(set(known.get("client", [""] * 4)) - {""}) or 4
        if args.partition == "given" and args.clients not in (None, count):
            raise InputError(f"--clients {args.clients}: the column client has {count}")
        args.clients = args.clients or count


def make_splits(args: argparse.Namespace, images: Images) -> dict[str, splits.Split]:
    """The split that the flags describe, named "", or those of cross-validation, fold1, fold2, ...
    What may not be cut stays together: images of one patient or group, else identical images.
    Prints test images with an identical twin in training."""
    labels, units = images.labels.numpy(), list(images.units().values())
    joined = splits.joined(units).tolist() if units else None
    known = {"paths": images.paths, "groups": joined or images.digests}
    if getattr(args, "folds", 1) > 1:
        folds = splits.make_folds(args.split, labels, args.folds, args.split_seed,
                                  inner_val=args.inner_val, **known)
        several = {f"fold{k}": fold for k, fold in enumerate(folds, 1)}
    elif args.split == "given":
        several = {"": splits.given(images.known["split"], labels, args.split_seed, joined)}
    else:
        several = {"": splits.make_split(args.split, labels, args.split_seed, **known)}
    _check_parts(args, images, list(several.values()))
    return several


def _check_parts(args: argparse.Namespace, images: Images, several: list[splits.Split]) -> None:
    """InputError where a training part lacks a class. Counts twins, warns of both sides."""
    labels, twins, sizes = images.labels.numpy(), Counter(), Counter()
    for split in several:
        absent = set(labels.tolist()) - set(labels[split["train"]].tolist())
        if absent:
            raise InputError(f"class {images.classes[min(absent)]} is too small for the "
                             f"{args.split} split: the training part has none of it")
        for part in ("val", "test"):
            twins[part] += splits.count_twins(images.digests, split[part], split["train"])
            sizes[part] += len(split[part])
    copies = len(images.digests) - len(set(images.digests))
    print(f"identical images: {copies} copies of another; with a twin in training: "
          f"{twins['val']} of {sizes['val']} validation, "
          f"{twins['test']} of {sizes['test']} test images")
    for line in both_sides(images, several):
        warn(f"WARNING: {line}")


def both_sides(images: Images, several: list[splits.Split]) -> list[str]:
    """A sentence for patients, and for groups, with images in training and in the test part of the
    same split, where they are known; and one for a test part that selects the model."""
    lines = []
    if any(np.isin(s["val"], s["test"]).any() for s in several):
        lines.append("the model is selected on its own test part (the paper's Table 1), so that "
                     "the test figures are optimistic")
    for unit, numbers in images.units().items():
        if shared := len({unit for s in several for unit in
                          np.intersect1d(numbers[s["train"]], numbers[s["test"]]).tolist()}):
            lines.append(f"{shared} {unit}(s) have images in the training part and in the test part"
                         f", so that the test figures are not those of new {unit}s")
    return lines


def make_clients(args: argparse.Namespace, images: Images, split: splits.Split) -> list[np.ndarray]:
    """The training part dealt to the clients that the flags describe."""
    if args.partition == "given":
        return list(splits.owned(images.known["client"], split).values())
    if args.partition == "stain":
        owner = stain_owners(args, images, split["train"])
        clients = [split["train"][owner[split["train"]] == k] for k in range(args.clients)]
        if not all(map(len, clients)):
            raise InputError(f"--partition stain: no class has images for {args.clients} clients")
        red, train = colour_statistics(images.array(), "means")[:, 0], split["train"]
        classes = [train[images.labels[train] == c] for c in range(len(images.classes))]
        print("mean red of the hospitals " + ", ".join(f"{red[own].mean():.1f}" for own in clients)
              + "; of the classes " + ", ".join(f"{red[own].mean():.1f}" for own in classes))
        return clients
    return splits.partition(args.partition, images.labels.numpy(), split["train"], args.clients,
                            args.split_seed, alpha=args.alpha,
                            classes_per_client=args.classes_per_client)


def stain_owners(args: argparse.Namespace, images: Images, train: np.ndarray) -> np.ndarray:
    """int64 [n]: the hospital of every image under --partition stain."""
    return splits.stain_owners(colour_statistics(images.array(), "statistics"),
                               images.labels.numpy(), images.paths, train, args.clients)


def deal_part(args: argparse.Namespace, images: Images, part: np.ndarray,
              clients: list[np.ndarray]) -> list[np.ndarray]:
    """Validation or test images as shares of the clients: those that the table gives to one go to
    it, and the others are dealt so that each share mirrors its client's training classes."""
    if args.partition == "stain":  # each hospital is judged on its own stain
        owner = stain_owners(args, images, np.sort(np.concatenate(clients)))
        return [part[owner[part] == k] for k in range(len(clients))]
    given = images.known.get("client", np.full(len(images.labels), ""))[part]
    counts = np.array([images.class_counts(own) for own in clients]).T  # [C, K]
    dealt = splits.deal(images.labels.numpy(), part[given == ""], counts,
                        np.random.default_rng([args.split_seed, 99]))
    return [np.sort(np.concatenate([share, part[given == name]])) for share, name in
            zip(dealt, images.client_names(clients), strict=True)]
