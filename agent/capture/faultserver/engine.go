package faultserver

import (
	"fmt"

	"github.com/cilium/ebpf/btf"

	"github.com/ckagent/ckagent/uffd"
)

// engine is how the content of armed pages is kept while the guest writes on. The
// command loop calls its methods, in this order; stop may come at any time after
// start, and close comes last.
type engine interface {
	// features are those its userfaultfd needs.
	features() uffd.Features
	// start begins to look after writes: from here on pages are armed, and QEMU's main
	// thread, the one that answers us, writes guest RAM too.
	start() error
	// settle re-arms what was written since the arm, while the guest runs, and again
	// right before it is stopped: little is left for freeze.
	settle() error
	// freeze re-arms the rest, while the guest stands still, and begins to keep the
	// content of pages. It returns how many runs of pages it armed.
	freeze() (runs int, err error)
	// scan starts to capture what the guest does not write.
	scan()
	// unblock lets the guest go on, if it waits for us in any way but a page's mark;
	// marks are about to be taken off, and nothing is to be captured any more.
	unblock()
	// stop ends what start and scan began, when nothing is armed any more, and adds
	// the engine's figures to the statistics.
	stop() error
	close() error
}

// Engine names one.
type Engine string

const (
	// Synchronous has the guest's writes wait for a thread of ours.
	Synchronous Engine = "uffd"
	// Kernel copies pages in the kernel before they are written.
	Kernel Engine = "bpf"
)

// newEngine makes the engine that is configured; types are the kernel's, for Kernel.
func newEngine(s *server, types *btf.Cache) (engine, error) {
	switch s.cfg.Engine {
	case "", Synchronous:
		return newSyncEngine(s), nil
	case Kernel:
		return newKernelEngine(s, types)
	}
	return nil, fmt.Errorf("fault server: unknown engine %q", s.cfg.Engine)
}
