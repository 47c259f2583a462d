package agent

import (
	"context"
	"errors"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

// merger bounds the chain of a protected VM: before it has as many checkpoints as it
// may, the newest is made independent of the others in the background, so that the next
// one continues a full one and the guest is never read whole again. One goroutine at a
// time, of the lowest priority; where it does not get there in time, a full checkpoint
// is taken. The zero value is ready.
type merger struct {
	mu     sync.Mutex
	cancel context.CancelFunc
	done   chan struct{} // of the one that runs; nil: none has
}

// mergeFrom is the part of a chain's greatest length at which merging begins.
const mergeFrom = 2

// after looks at a checkpoint that was just taken. failed is told, from another
// goroutine, about a merge that did not succeed.
func (g *merger) after(st *store.Store, m *image.Manifest, fullEvery int, compress string, failed func(error)) {
	if fullEvery == 0 {
		fullEvery = capture.DefaultFullEvery
	}
	if m.Depth == 0 || m.Depth+1 < (fullEvery+mergeFrom-1)/mergeFrom {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.done != nil {
		select {
		case <-g.done:
		default:
			return // the next one is for the checkpoint after this
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	g.cancel, g.done = cancel, done
	id := m.ID
	go func() { // ended and joined by stop
		defer close(done)
		runtime.LockOSThread() // the thread ends with us, and its priority with it
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
		_, err := st.Merge(ctx, id, store.MergeOptions{Compress: compress})
		if err != nil && ctx.Err() == nil && !problem.Is(err, problem.NotFound) { // retention may have been faster
			failed(errors.Join(problem.New(problem.CodeOf(err), "merge checkpoint", id, "the chain stays as it is"), err))
		}
	}()
}

// stop ends a merge under way, which leaves the checkpoint as it was.
func (g *merger) stop() {
	g.mu.Lock()
	cancel, done := g.cancel, g.done
	g.mu.Unlock()
	if done == nil {
		return
	}
	cancel()
	<-done
}
