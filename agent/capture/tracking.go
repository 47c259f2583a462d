package capture

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/uffd"
)

// Tracking knows, between two checkpoints by engine bpf, which pages were written: the
// marks of the first stay in the guest's memory. They hold up nobody, since the kernel
// takes them off by itself (WP_ASYNC), and they go with the descriptor held here: when it
// is closed, or we die. What they cost the guest is a fault for the first write to each
// page, and its huge pages where it writes, for as long as they are there.
//
// A Tracking has one owner at a time, who gives it to one Take after the other. The zero
// value tracks nothing yet.
type Tracking struct {
	f      *os.File // of a userfaultfd with marks; nil: there are none
	since  string   // id of the checkpoint at whose instant they were made
	blocks []source.Block
}

// Since is the checkpoint since which writes are known; empty: none.
func (k *Tracking) Since() string {
	if k == nil {
		return ""
	}
	return k.since
}

// Close takes the marks off. The Tracking may be used again.
func (k *Tracking) Close() error {
	if k == nil || k.f == nil {
		return nil
	}
	f := k.f
	k.f, k.since = nil, ""
	h, err := uffd.Resume(f) // closes f
	if err != nil {
		return fmt.Errorf("let go of what is tracked: %w", err)
	}
	return errors.Join(faultserver.LetGo(h, k.blocks), h.Close())
}

// serves reports whether the marks tell what was written since a checkpoint, in memory
// that lies where it lay.
func (k *Tracking) serves(parent string, blocks []source.Block) bool {
	return k.f != nil && parent != "" && k.since == parent && slices.Equal(k.blocks, blocks)
}

// track prepares an attempt: its fault server goes on from the marks there are, or there
// are none.
func (s *session) track(o *faultserver.Start) error {
	k := s.o.Track
	if k == nil {
		return nil
	}
	s.tracked = s.engine == EngineBPF && k.serves(s.parent, s.blocks)
	if !s.tracked {
		if err := k.Close(); err != nil {
			return err
		}
	}
	if o != nil && s.engine == EngineBPF {
		o.Config.Keep, o.Config.Kept, o.Kept = true, s.tracked, k.f
	}
	return nil
}

// hold takes hold of the marks of an attempt that has just made them.
func (s *session) hold(srv *faultserver.Client) (err error) {
	k := s.o.Track
	if k == nil || s.engine != EngineBPF || s.tracked {
		return nil
	}
	k.blocks = slices.Clone(s.blocks)
	k.f, err = srv.Userfaultfd()
	return err
}
