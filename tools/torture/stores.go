package torture

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/torture/hangfs"
)

// Trouble is what a store does.
type Trouble string

const (
	Hangs       Trouble = "hangs, then answers with errors" // after the agent was asked to end
	HangsKilled Trouble = "hangs, agent killed"             // which cannot die while it waits for the store
	FillsUp     Trouble = "fills up while it is written"
	IsFull      Trouble = "is full before"
	IsSlow      Trouble = "takes 10 ms longer per write"
)

// Stores runs n rounds of each trouble, at operations drawn at random from those of
// an undisturbed checkpoint.
func (c *Campaign) Stores(ctx context.Context, rng *rand.Rand, n int) error {
	b, err := NewBed(ctx, c.ground, Sizes["256 MiB"])
	if err != nil {
		return fmt.Errorf("new guest: %w", err)
	}
	defer func() { b.Close() }()
	ops, bytes, err := b.storeSurvey(ctx)
	if err != nil {
		return err
	}
	for i := range n {
		for _, trouble := range []Trouble{Hangs, HangsKilled, FillsUp, IsFull, IsSlow} {
			if ctx.Err() != nil {
				return nil
			}
			if i >= 3 && (trouble == IsFull || trouble == IsSlow) {
				continue // nothing about them is random
			}
			o := b.StoreRound(context.WithoutCancel(ctx), trouble, rng.IntN(ops), uint64(rng.Int64N(int64(bytes))))
			c.note(o)
			if len(o.Exceptions) > 0 {
				b.Close()
				if b, err = NewBed(ctx, c.ground, Sizes["256 MiB"]); err != nil {
					return fmt.Errorf("new guest: %w", err)
				}
			}
		}
	}
	c.note(b.lastWords())
	return nil
}

// storeSurvey counts what an undisturbed checkpoint asks of a store.
func (b *Bed) storeSurvey(ctx context.Context) (ops int, bytes uint64, err error) {
	m, backing, done, err := b.mount()
	if err != nil {
		return 0, 0, err
	}
	done = sync.OnceFunc(done)
	defer done()
	before := m.Ops()
	r := &run{b: b, round: Round{Kind: "store", Victim: Nobody, Action: None, Mode: "cow"}, out: &Outcome{}, acted: make(chan struct{}), undo: func() {}, store: m.Path()}
	ended, err := r.start()
	if err != nil {
		return 0, 0, err
	}
	<-ended
	if r.out.Exit == 5 {
		done()
		return b.storeSurvey(ctx) // on a host without time
	}
	if r.out.Exit != 0 {
		return 0, 0, fmt.Errorf("a checkpoint to an undisturbed FUSE store ended with %d: %s", r.out.Exit, r.log.String())
	}
	err = filepath.WalkDir(backing, func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			bytes += uint64(info.Size())
		}
		return err
	})
	return m.Ops() - before, bytes, err
}

func (b *Bed) mount() (m *hangfs.Mounted, backing string, done func(), err error) {
	at, err := os.MkdirTemp(b.dir, "fuse-")
	if err != nil {
		return nil, "", nil, err
	}
	backing = at + ".backing"
	if err := os.Mkdir(backing, 0o700); err != nil {
		return nil, "", nil, err
	}
	if m, err = hangfs.Mount(at, backing); err != nil {
		return nil, "", nil, err
	}
	return m, backing, func() { _ = m.Close(); os.RemoveAll(backing); os.Remove(at) }, nil
}

// StoreRound takes a checkpoint to a store in trouble: after op operations, or
// after that many bytes.
func (b *Bed) StoreRound(ctx context.Context, trouble Trouble, op int, bytes uint64) *Outcome {
	out := &Outcome{Round: Round{Kind: "store", Victim: "store", Action: None, Mode: "cow", Step: string(trouble)}, Size: b.size.Name}
	r := &run{b: b, round: out.Round, out: out, acted: make(chan struct{}), undo: func() {}}
	host := watchHost()
	b.storeRound(ctx, r, trouble, op, bytes)
	out.Starved = host.end()
	if len(out.Exceptions) > 0 {
		out.Log = r.log.String() + b.reports()
	}
	return out
}

func (b *Bed) storeRound(ctx context.Context, r *run, trouble Trouble, op int, bytes uint64) {
	out := r.out
	backing := ""
	var end func()
	var hung <-chan struct{}
	switch trouble {
	case IsFull:
		dir, err := os.MkdirTemp(b.dir, "full-")
		if err == nil {
			err = unix.Mount("full", dir, "tmpfs", 0, "size=1m")
		}
		if err != nil {
			out.fail("make a full store: %v", err)
			return
		}
		r.store, backing = dir, dir
		end = func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }
	default:
		m, below, done, err := b.mount()
		if err != nil {
			out.fail("mount: %v", err)
			return
		}
		r.store, backing, end = m.Path(), below, done
		switch trouble {
		case Hangs, HangsKilled:
			m.HangAfter(op)
			hung = m.Hung()
		case FillsUp:
			m.FullAfter(bytes)
		case IsSlow:
			m.Slow(10 * time.Millisecond)
		}
	}
	defer func() { end() }()
	b.tap.reset(nil, nil)
	began := time.Now()
	ended, err := r.start()
	if err != nil {
		out.fail("start: %v", err)
		return
	}
	agent, err := hold(r.cmd.Process.Pid)
	if err != nil {
		out.fail("hold the agent: %v", err)
		return
	}
	defer agent.close()
	r.at = began
	out.Acted = true
	if hung != nil {
		select {
		case <-hung:
			r.at = time.Now()
			out.InPause = b.tap.paused()
			b.whileHung(ctx, r, agent, trouble)
			// The store answers again, with errors: whoever waits in the kernel is
			// let go.
			var once bool
			done := end
			end = func() {
				if !once {
					once = true
					done()
				}
			}
			list := r.visible(ctx, backing)
			out.Exceptions = append(out.Exceptions, list...)
			end()
		case <-ended:
			out.Acted = false // it needed fewer operations this time
		case <-time.After(agentPatience):
			out.fail("the agent did not end within %v", agentPatience)
		}
	}
	patience := agentPatience
	if trouble == IsSlow {
		patience *= 3 // ten or twenty seconds of it are the store's own, by our making
	}
	if !agent.ended(patience) {
		out.fail("the agent has not ended %v after the store answers again", patience)
		_ = agent.signal(unix.SIGKILL)
	}
	<-ended
	switch {
	case trouble == FillsUp && out.Exit == 0:
		out.Acted = false
	case trouble == IsSlow && (out.Exit == 0 || out.Exit == 7):
	case trouble == HangsKilled && out.Exit == -1, trouble == Hangs && (out.Exit == 130 || out.Exit == -1 || out.Exit == 7):
	case !out.Acted && out.Exit == 0:
	case out.Exit == 5:
		out.Busy = true
	case (trouble == FillsUp || trouble == IsFull) && out.Exit == 7:
	default:
		out.fail("store %s: the agent ended with %d", trouble, out.Exit)
	}
	if out.Exit > 0 {
		r.checkMessage()
	}
	var left []int
	if !await(afterwards, func() bool { left = orphans(); return len(left) == 0 }) {
		for _, pid := range left {
			out.fail("left behind: pid %d %s", pid, verbOf(pid))
			_ = unix.Kill(pid, unix.SIGKILL) // our own descendant, and not reaped yet
		}
	}
	why := b.settled(ctx, false)
	await(time.Second, func() bool { why = b.settled(ctx, false); return why == nil })
	if why != nil {
		out.fail("after the agent's end: %v", why)
	}
	out.Silence, out.Longest = silence(b.vm.Beats(), began, r.at, time.Now())
	if bound := Bound(b.size.MemoryMiB); out.Silence > bound {
		out.failLate("the guest was silent for %v, bound %v", out.Silence.Round(time.Millisecond), bound)
	}
	if err := errors.Join(b.leftovers(), b.moreOpen()); err != nil {
		out.fail("%v", err)
	}
	if hung == nil || !out.Acted {
		want := 0
		if out.Exit == 0 {
			want = 1
		}
		if got := r.count(ctx, backing); got != want {
			out.fail("%d checkpoints are visible in the store, want %d", got, want)
		}
	}
}

// whileHung: the store does not answer. The guest must not care; and when the agent
// is told to end, nothing of ours may stay in QEMU, though the agent itself cannot
// die before the store answers.
func (b *Bed) whileHung(ctx context.Context, r *run, agent *Proc, trouble Trouble) {
	out := r.out
	bound := Bound(b.size.MemoryMiB)
	agent.ended(time.Second) // as long as a user might wait before he acts
	sig := unix.SIGINT
	if trouble == HangsKilled {
		sig = unix.SIGKILL
	}
	at := time.Now()
	_ = agent.signal(sig) // it may have ended by itself
	why := b.settled(ctx, false)
	await(bound+3*time.Second, func() bool { why = b.settled(ctx, false); return why == nil })
	out.Settled = time.Since(at)
	switch {
	case why != nil:
		out.fail("the store hangs, %s: after %v: %v", unix.SignalName(sig), out.Settled.Round(time.Millisecond), why)
	case out.Settled > bound+checkSlack(b.size):
		out.failLate("the store hangs, %s: nothing of ours was in QEMU only after %v, bound %v", unix.SignalName(sig), out.Settled.Round(time.Millisecond), bound)
	}
}

// visible: what is visible in a directory that a store was written to is whole.
func (r *run) visible(ctx context.Context, dir string) (wrong []string) {
	if n := r.count(ctx, dir); n > 1 || n < 0 {
		wrong = append(wrong, fmt.Sprintf("%d checkpoints are visible", n))
	}
	return wrong
}

// count lists a store with the binary, as a user would; -1 if a checkpoint of it is
// damaged or it cannot be listed.
func (r *run) count(ctx context.Context, dir string) int {
	out, err := command(ctx, r.b.g.Binary, "ls", "--store", dir, "--json")
	if err != nil {
		return -1
	}
	var list struct {
		Checkpoints []struct{ ID, Damage string }
	}
	if json.Unmarshal(out, &list) != nil {
		return -1
	}
	for _, c := range list.Checkpoints {
		if c.Damage != "" {
			return -1
		}
		if _, err := command(ctx, r.b.g.Binary, "verify", c.ID, "--store", dir, "--json"); err != nil {
			return -1
		}
	}
	return len(list.Checkpoints)
}
