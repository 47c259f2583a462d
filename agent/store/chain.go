package store

import (
	"context"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// Chains. A checkpoint that continues another has names of its own for the segments
// whose pages it took over, so its directory is whole by itself: the others can be
// removed, merged or damaged in any order. The content of a segment goes with its last
// name. A parent needs a lease only while its child gets those names.

// OpenParent opens the checkpoint that a new one of the VM can continue: the one that
// ref names, or with ref empty the newest that is whole. nil if there is none; a
// checkpoint that was asked for and does not serve is problem.Refused.
func (s *Store) OpenParent(ctx context.Context, vm, ref string, key *image.TagKey) (*Image, error) {
	const op = "continue checkpoint"
	if ref != "" {
		img, err := s.OpenImage(ctx, ref)
		if err != nil {
			return nil, err
		}
		m := img.Manifest()
		if err = image.Usable(m, key); m.VM != vm {
			err = problem.New(problem.Refused, op, m.ID, "it is of VM %s", m.VM)
		}
		if err != nil {
			img.Close()
			return nil, problem.New(problem.Refused, op, m.ID, "%w", err).WithHint("take a full one: --parent none")
		}
		return img, nil
	}
	list, err := s.committedOf(op, vm)
	if err != nil {
		return nil, err
	}
	return s.openNewest(ctx, list, key)
}

// OpenDonors opens the newest checkpoints of other VMs whose pages got their tags with
// the same key, at most max of them.
func (s *Store) OpenDonors(ctx context.Context, vm string, key *image.TagKey, max int) ([]*Image, error) {
	const op = "look for donors"
	vms, err := s.vmDirs(op)
	if err != nil {
		return nil, err
	}
	var out []*Image
	for _, dir := range vms {
		if dir == vmDir(vm) || len(out) == max {
			continue
		}
		list, err := s.committedIn(op, dir)
		if err != nil {
			CloseAll(out)
			return nil, err
		}
		if img, err := s.openNewest(ctx, list, key); err != nil {
			CloseAll(out)
			return nil, err
		} else if img != nil {
			out = append(out, img)
		}
	}
	return out, nil
}

// CloseAll closes images; their leases end with the process if not before.
func CloseAll(images []*Image) {
	for _, i := range images {
		_ = i.Close()
	}
}

// openNewest opens the first of these that is whole and serves; nil if none does.
func (s *Store) openNewest(ctx context.Context, list []candidate, key *image.TagKey) (*Image, error) {
	for _, c := range list {
		img, err := s.openLeased(ctx, c)
		if err == nil {
			if image.Usable(img.Manifest(), key) == nil {
				return img, nil
			}
			// An older one would be no better: the key or the version has changed.
			return nil, img.Close()
		}
		switch problem.CodeOf(err) {
		case problem.Integrity, problem.Refused, problem.NotFound:
		default:
			return nil, err
		}
	}
	return nil, nil
}
