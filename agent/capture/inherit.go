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
// every page that is not in it and is there has the content that it had then.
type Written struct {
	Since string     // id of that checkpoint
	Pages [][]uint64 // per RAMBlock, a bit a page
}

// openWriter starts the image, with what it can take over from other checkpoints.
func (s *session) openWriter(ctx context.Context, txn *store.Txn, blocks []image.Block) error {
	o := image.WriterOptions{Compress: s.o.Compress, Direct: s.o.Direct, VM: s.sub.Name}
	if s.o.FullEvery == 1 && !s.o.Dedup && !s.asked() {
		// No child of it is wanted: tags, half a microsecond a page, would be for nothing.
		var err error
		s.writer, err = image.NewWriter(txn.Dir(), blocks, o)
		return err
	}
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
	if s.o.Written == nil {
		return nil, nil
	}
	w, err := s.o.Written(ctx)
	if err != nil || w == nil || w.Since == "" || w.Since != s.parent {
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

// runs appends the runs that make up the pages [first, first+n) of a block. What is
// absent is zeros, written or not: a discard (balloon, MADV_DONTNEED) leaves no mark.
func (w *Written) runs(src *source.Source, block int, first, n uint64, out []pageRun, scratch *[]source.Run) ([]pageRun, error) {
	var err error
	if *scratch, err = src.Runs(block, first, n, (*scratch)[:0]); err != nil {
		return out, err
	}
	for _, r := range *scratch {
		if w == nil || r.Zero {
			out = append(out, pageRun{Run: r})
			continue
		}
		for first, end := r.First, r.First+r.Pages; first < end; {
			in, to := w.has(block, first), first+1
			for to < end && w.has(block, to) == in {
				to++
			}
			out = append(out, pageRun{Run: source.Run{First: first, Pages: to - first}, unchanged: !in})
			first = to
		}
	}
	return out, nil
}

func (w *Written) has(block int, page uint64) bool { return w.Pages[block][page/64]>>(page%64)&1 != 0 }
