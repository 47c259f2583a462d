package torture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ckagent/ckagent/agent/capture/proving"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// Ground is what all beds of a campaign share.
type Ground struct {
	Binary string // ckagent
	Dir    string // for everything that is made
	n      atomic.Int64
	warm   atomic.Bool
}

// Size is a guest to work on.
type Size struct {
	Name      string
	MemoryMiB int
	WSMiB     int
	Rate      int
	Backend   vmtest.Backend
}

// Sizes of guests. The large ones have all their RAM populated (prealloc=on), so
// that all of it has to be armed and let go of.
var Sizes = map[string]Size{
	"256 MiB": {Name: "256 MiB", MemoryMiB: 256, WSMiB: 48, Rate: 4000},
	"1 GiB":   {Name: "1 GiB", MemoryMiB: 1024, WSMiB: 256, Rate: 4000, Backend: vmtest.Prealloc},
	"4 GiB":   {Name: "4 GiB", MemoryMiB: 4096, WSMiB: 512, Rate: 4000, Backend: vmtest.Prealloc},
	"8 GiB":   {Name: "8 GiB", MemoryMiB: 8192, WSMiB: 1024, Rate: 4000, Backend: vmtest.Prealloc},
}

// beatUS is the heartbeat of the guests.
const beatUS = 1000

// Bed is a guest that rounds are taken on.
type Bed struct {
	g     *Ground
	size  Size
	vm    *vmtest.VM
	proxy *vmtest.Proxy
	tap   *tap
	store string
	state string // CKAGENT_RUN_DIR of the agents
	dir   string
	fds   map[string]int // of QEMU, by what they are, before anything of ours
	base  string         // the checkpoint that must stay whole
	seen  int            // visible checkpoints, base included
	typ   time.Duration  // how long an unharmed checkpoint takes
	cage  *cage
}

// NewBed starts a guest and takes its first checkpoint.
func NewBed(ctx context.Context, g *Ground, size Size) (_ *Bed, err error) {
	n := g.n.Add(1)
	b := &Bed{g: g, size: size, tap: &tap{}, dir: filepath.Join(g.Dir, fmt.Sprintf("bed%d", n))}
	b.store, b.state = filepath.Join(b.dir, "store"), filepath.Join(b.dir, "run")
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return nil, err
	}
	// Ahead, where nothing is harmed: a checkpoint that asks for engine bpf would wait for it.
	if _, err := proving.New([]string{g.Binary}).All(ctx, proving.ByAuto); err != nil {
		return nil, err
	}
	b.cage = newCage(fmt.Sprintf("ckagent-torture-%d-%d", os.Getpid(), n))
	defer func() {
		if err != nil {
			b.Close()
		}
	}()
	b.vm, err = vmtest.Launch(ctx, vmtest.Config{
		Name: fmt.Sprintf("torture-%d-%d", os.Getpid(), n), Dir: b.dir, Guest: vmtest.Mini, MemoryMiB: size.MemoryMiB, WSMiB: size.WSMiB,
		Rate: size.Rate, Backend: size.Backend, BeatUS: beatUS, Control: true, Append: "sweep=20000",
	})
	if err != nil {
		return nil, err
	}
	mine.add(b.vm.PID())
	if b.proxy, err = vmtest.NewProxy(filepath.Join(b.dir, "proxy.sock"), b.vm.QMPPath()); err != nil {
		return nil, err
	}
	b.proxy.Add(vmtest.Rule{Match: b.tap.match, Decide: b.tap.decide})
	if b.fds, err = openFiles(b.vm.PID()); err != nil {
		return nil, err
	}
	if err := b.takeBase(ctx); err != nil {
		return nil, err
	}
	return b, nil
}

// takeBase takes checkpoints until their length is known; the last stays.
func (b *Bed) takeBase(ctx context.Context) error {
	// The first of a ground is slow, with nothing of the binary in memory.
	first := b.g.warm.CompareAndSwap(false, true)
	for n := 0; n < 1 || first && n < 2; {
		o := b.Run(ctx, Round{Kind: "unharmed", Victim: Nobody, Action: None, Mode: "cow"})
		if len(o.Exceptions) > 0 {
			return fmt.Errorf("an unharmed checkpoint: %s\n%s", strings.Join(o.Exceptions, "; "), o.Log)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if !o.Busy {
			n++
		}
	}
	list, err := b.list(ctx)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return errors.New("an unharmed checkpoint is not listed")
	}
	b.base, b.seen = list[len(list)-1].ID, len(list)
	for _, i := range list {
		if i.ID > b.base {
			b.base = i.ID
		}
	}
	return b.prune(ctx, nil)
}

// list is what of the store is visible.
func (b *Bed) list(ctx context.Context) ([]store.Info, error) {
	st, err := store.Open(b.store)
	if err != nil {
		return nil, err
	}
	list, err := st.List(ctx)
	if problem.Is(err, problem.NotFound) {
		return nil, nil
	}
	return list, err
}

// prune removes what was seen but is not the base, and what dead writers left.
func (b *Bed) prune(ctx context.Context, list []store.Info) error {
	st, err := store.Open(b.store)
	if err != nil {
		return err
	}
	if list == nil {
		if list, err = b.list(ctx); err != nil {
			return err
		}
	}
	for _, i := range list {
		if i.ID == b.base {
			continue
		}
		if _, err := st.Remove(ctx, i.ID, true); err != nil {
			return fmt.Errorf("remove %s: %w", i.ID, err)
		}
	}
	b.seen = 1
	return nil
}

// PID is the guest's QEMU.
func (b *Bed) PID() int { return b.vm.PID() }

// Close ends the guest and removes everything.
func (b *Bed) Close() {
	if b.proxy != nil {
		b.proxy.Close()
	}
	if b.vm != nil {
		b.vm.Kill()
		mine.drop(b.vm.PID())
	}
	b.cage.remove()
	os.RemoveAll(b.dir)
}

// status asks QEMU, on a connection of our own, whether the guest runs.
func (b *Bed) status(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	m, err := vmtest.DialMonitor(ctx, b.vm.ControlPath())
	if err != nil {
		return "", err
	}
	defer m.Close()
	var st struct{ Status string }
	err = m.Execute(ctx, "query-status", nil, &st)
	return st.Status, err
}

// command runs stop or cont on that connection.
func (b *Bed) command(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	m, err := vmtest.DialMonitor(ctx, b.vm.ControlPath())
	if err != nil {
		return err
	}
	defer m.Close()
	return m.Execute(ctx, name, nil, nil)
}
