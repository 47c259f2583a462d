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
	f     *os.File // of a userfaultfd with marks; nil: there are none
	marks Marks
}

// Marks is what is to be known of marks beside their descriptor.
type Marks struct {
	Checkpoint string         `json:"checkpoint,omitempty"` // id of the one at whose instant they were made
	Blocks     []source.Block `json:"blocks,omitempty"`     // where the memory lay then
}

// Tracked takes marks over from another process of ours; nil: there are none.
func Tracked(m Marks, f *os.File) *Tracking {
	if f == nil {
		m = Marks{}
	}
	return &Tracking{f, m}
}

// Give gives the marks away, to another process of ours, whose they are when it has the file:
// then that is to be closed here. nil: there are none.
func (k *Tracking) Give() (Marks, *os.File) {
	given := *k
	*k = Tracking{}
	return given.marks, given.f
}

// Since is the checkpoint since which writes are known; empty: none.
func (k *Tracking) Since() string {
	if k == nil {
		return ""
	}
	return k.marks.Checkpoint
}

// Close takes the marks off. The Tracking may be used again.
func (k *Tracking) Close() error {
	if k == nil || k.f == nil {
		return nil
	}
	m, f := k.Give()
	h, err := uffd.Resume(f) // closes f
	if err != nil {
		return fmt.Errorf("let go of what is tracked: %w", err)
	}
	return errors.Join(faultserver.LetGo(h, m.Blocks), h.Close())
}

// serves reports whether the marks tell what was written since a checkpoint, in memory
// that lies where it lay.
func (k *Tracking) serves(parent string, blocks []source.Block) bool {
	return k.f != nil && parent != "" && k.marks.Checkpoint == parent && slices.Equal(k.marks.Blocks, blocks)
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
	k.marks.Blocks = slices.Clone(s.blocks)
	k.f, err = srv.Userfaultfd()
	return err
}
