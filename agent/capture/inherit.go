package capture

import (
	"context"
	"fmt"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

// What Options.Parent may be beside an id.
const (
	ParentAuto = "auto" // the newest checkpoint of the VM that can be continued
	ParentNone = "none" // a full checkpoint
)

// DefaultFullEvery is how many checkpoints a chain has at most.
const DefaultFullEvery = 32

// maxDonors bounds the VMs whose content a checkpoint is compared with.
const maxDonors = 16

// Written is what somebody knows who tracked the guest's writes since a checkpoint:
// every page that is not in it has the content that it had then.
type Written struct {
	Since string     // id of that checkpoint
	Pages [][]uint64 // per RAMBlock, a bit a page
}

// openWriter starts the image, with what it can take over from other checkpoints.
func (s *session) openWriter(ctx context.Context, txn *store.Txn, blocks []image.Block) error {
	o := image.WriterOptions{Compress: s.o.Compress, VM: s.sub.Name}
	scope := s.o.Tenant
	if scope == "" {
		scope = "vm:" + s.sub.Name
	} else {
		scope = "tenant:" + scope
	}
	var err error
	if o.Key, err = s.store.TagKey(ctx, scope); err != nil {
		if s.asked() {
			return err
		}
		return s.openFull(txn, blocks, o, err)
	}
	var images []*store.Image
	defer func() { store.CloseAll(images) }()
	if s.o.Parent != ParentNone {
		p, err := s.openParent(ctx, o.Key)
		if err != nil {
			return err
		}
		if p != nil {
			images = append(images, p)
			o.Parent = p.Reader
		}
	}
	if s.o.Dedup {
		o.Dedup = true
		donors, err := s.store.OpenDonors(ctx, s.sub.Name, o.Key, maxDonors)
		if err != nil {
			return err
		}
		for _, d := range donors {
			images = append(images, d)
			o.Donors = append(o.Donors, d.Reader)
		}
	}
	s.writer, err = image.NewWriter(txn.Dir(), blocks, o)
	if err != nil {
		if s.asked() || !image.NotInherited(err) {
			return err
		}
		o.Parent, o.Donors = nil, nil
		return s.openFull(txn, blocks, o, err)
	}
	if o.Parent != nil {
		m := o.Parent.Manifest()
		s.parent, s.depth = m.ID, m.Depth+1
		s.o.tell("parent", 0, "continues %s", m.ID)
	}
	return nil
}

// asked reports whether a certain checkpoint has to be continued.
func (s *session) asked() bool { return s.o.Parent != ParentAuto && s.o.Parent != ParentNone }

// openFull starts an image that takes nothing over.
func (s *session) openFull(txn *store.Txn, blocks []image.Block, o image.WriterOptions, why error) (err error) {
	s.res.Notes = append(s.res.Notes, fmt.Sprintf("a full checkpoint, since none could be continued: %v", why))
	s.writer, err = image.NewWriter(txn.Dir(), blocks, o)
	return err
}

// openParent opens what the checkpoint continues; nil if it has to be a full one.
func (s *session) openParent(ctx context.Context, key *image.TagKey) (*store.Image, error) {
	ref := s.o.Parent
	if ref == ParentAuto {
		ref = ""
	}
	p, err := s.store.OpenParent(ctx, s.sub.Name, ref, key)
	if err != nil || p == nil {
		return nil, err
	}
	if m := p.Manifest(); s.asked() || m.Depth+1 < s.o.FullEvery {
		return p, nil
	}
	s.o.tell("parent", 0, "a full checkpoint after %d", s.o.FullEvery)
	return nil, p.Close()
}

// written is what was written since the parent, for modes that read RAM while the VM
// stands still; nil if that is not known.
func (s *session) written(ctx context.Context) (*Written, error) {
	if s.o.Written == nil || s.parent == "" {
		return nil, nil
	}
	w, err := s.o.Written(ctx)
	if err != nil || w == nil || w.Since != s.parent {
		return nil, err
	}
	for i := range s.src.Blocks() {
		if i >= len(w.Pages) || uint64(len(w.Pages[i])) < (s.src.Block(i).Pages+63)/64 {
			return nil, problem.New(problem.Failed, "track RAM", s.object, "block %d: what was written is not known of all pages", i)
		}
	}
	return w, nil
}

// pageRun is a run of pages with what is known of them.
type pageRun struct {
	source.Run
	unchanged bool
}

// runs appends the runs that make up the pages [first, first+n) of a block.
func (w *Written) runs(src *source.Source, block int, first, n uint64, out []pageRun, scratch *[]source.Run) ([]pageRun, error) {
	content := func(first, n uint64) (err error) {
		*scratch, err = src.Runs(block, first, n, (*scratch)[:0])
		for _, r := range *scratch {
			out = append(out, pageRun{Run: r})
		}
		return err
	}
	if w == nil {
		err := content(first, n)
		return out, err
	}
	bit := func(p uint64) bool { return w.Pages[block][p/64]>>(p%64)&1 != 0 }
	for end := first + n; first < end; {
		in, to := bit(first), first+1
		for to < end && bit(to) == in {
			if !in && to%64 == 0 && w.Pages[block][to/64] == 0 {
				to = min(to+64, end)
				continue
			}
			to++
		}
		if in {
			if err := content(first, to-first); err != nil {
				return out, err
			}
		} else {
			out = append(out, pageRun{Run: source.Run{First: first, Pages: to - first}, unchanged: true})
		}
		first = to
	}
	return out, nil
}
