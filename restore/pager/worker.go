package pager

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// errSuperseded: somebody else has the seat.
var errSuperseded = errors.New("another process does this job now")

// Descriptors that spawn hands over.
const (
	controlFD = 3
	leashFD   = 4
)

// options is what both verbs understand.
type options struct {
	runDir, warm string
	resume       bool
	old          uint64 // whose seat to take, packed
}

func parseOptions(verb string, args []string) (*options, error) {
	o := &options{}
	f := flag.NewFlagSet(verb, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&o.runDir, "run-dir", "", "")
	f.StringVar(&o.warm, "warm", "", "")
	f.Uint64Var(&o.old, "old", 0, "")
	f.BoolVar(&o.resume, "resume", false, "")
	if err := f.Parse(args); err != nil {
		return nil, problem.New(problem.Usage, "start", verb, "%w", err)
	}
	if o.runDir == "" || f.NArg() != 0 {
		return nil, problem.New(problem.Usage, "start", verb, "started by hand").
			WithHint("this verb is internal")
	}
	return o, nil
}

// holdLeash waits until the starter says go; false if it went away instead.
func holdLeash() bool {
	f := os.NewFile(leashFD, "leash")
	defer f.Close()
	var b [1]byte
	n, _ := f.Read(b[:])
	return n == 1
}

// worker is one incarnation of the process that serves.
type worker struct {
	o       *options
	ctl     *control
	self    occupant
	openers map[string]Opener
	src     PageSource // opened while warm; nil otherwise

	mu sync.Mutex // guards st
	st *state
}

// Main is the worker process: args are what follows the verb. openers adds kinds
// of sources to the built-in image directory. It returns when everything is in
// and let go, when the process served has ended, or when another worker took over;
// an error means that the supervisor should start another one.
func Main(ctx context.Context, args []string, openers map[string]Opener) error {
	o, err := parseOptions(VerbWorker, args)
	if err != nil {
		return err
	}
	ctl, err := openControl(os.NewFile(controlFD, controlMapping))
	if err != nil {
		return problem.New(problem.Failed, "start", VerbWorker, "%w", err)
	}
	defer ctl.close()
	protect()
	defer cgroup.Join(groupName(workerRole.name, os.Getpid())).Leave()
	w := &worker{o: o, ctl: ctl, openers: map[string]Opener{SourceImage: openImage}}
	maps.Copy(w.openers, openers)
	if err := w.main(ctx); err != nil {
		w.log("%v", err)
		return err
	}
	return nil
}

func (w *worker) log(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s pager[%d]: %s\n", time.Now().Format(time.RFC3339Nano), os.Getpid(), fmt.Sprintf(format, args...))
}

func (w *worker) main(ctx context.Context) error {
	if !w.o.resume {
		// The expensive parts happen now, while the process to be served starts.
		if w.o.warm != "" {
			if src, err := w.openSource(ctx, []byte(w.o.warm)); err == nil {
				w.src = src // an error comes again, and is reported then
			}
		}
		defer func() {
			if w.src != nil {
				w.src.Close()
			}
		}()
		if !holdLeash() {
			return nil
		}
	}
	st, err := loadState(w.o.runDir)
	if err != nil {
		return err
	}
	w.st = st
	err = w.run(ctx)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errSuperseded):
		return nil
	case errors.Is(err, uffd.ErrGone):
		return w.finish(PhaseGone)
	case w.ctl.phaseNow() < PhaseServing:
		w.mu.Lock()
		w.st.Error = problem.ToWire(opPageIn, err)
		w.mu.Unlock()
		return errors.Join(err, w.finish(PhaseFailed))
	}
	return err
}

// finish publishes an ending.
func (w *worker) finish(p Phase) error {
	final := statsOf(w.ctl)
	err := w.update(p, func(st *state) { st.Final = &final })
	w.ctl.advance(p)
	// A stopped supervisor would never notice that the work is over.
	if s, serr := procstat.Read(w.ctl.supervisor.occupant().PID); serr == nil && s.Stopped() {
		endNow(supervisorRole, w.ctl)
	}
	if w.ctl.has(flagDetached) && !w.supervised() {
		cleanUp(w.o.runDir)
	}
	return err
}

// supervised reports whether somebody is left to tidy up.
func (w *worker) supervised() bool {
	fd, err := unix.PidfdOpen(w.ctl.supervisor.occupant().PID, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return alive(fd)
}

// update changes the state and writes it down.
func (w *worker) update(p Phase, change func(*state)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	change(w.st)
	w.st.Phase = max(p, w.ctl.phaseNow()).String()
	return writeFile(w.o.runDir, stateFile, w.st)
}

func (w *worker) openSource(ctx context.Context, spec []byte) (PageSource, error) {
	var s SourceSpec
	if err := unmarshalStrict(spec, &s); err != nil {
		return nil, problem.New(problem.Usage, "open source", string(spec), "%w", err)
	}
	return w.open(ctx, &s)
}

func (w *worker) open(ctx context.Context, s *SourceSpec) (PageSource, error) {
	open, ok := w.openers[s.Kind]
	if !ok {
		return nil, problem.New(problem.Usage, "open source", s.Kind, "this binary does not know such a source")
	}
	return open(ctx, s.Params)
}

func (w *worker) run(ctx context.Context) error {
	cfg := &w.st.Config
	debug.SetMemoryLimit(int64(cfg.MemoryBytes) * 3 / 4)
	// A fault thread that comes back from poll must find an idle P at once: not
	// wait until the scheduler takes one from a drainer that computes checksums.
	runtime.GOMAXPROCS(cfg.Workers + cfg.Drainers + 4)

	var err error
	if w.self, err = myself(); err != nil {
		return err
	}
	if !w.ctl.worker.claim(unpack(w.o.old), w.self, nowNS()) {
		return errSuperseded
	}

	pidfd, err := openTarget(cfg)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	stop, err := uffd.NewStop()
	if err != nil {
		return err
	}
	defer stop.Close()

	// Look after the supervisor for as long as there is anything to do.
	var aside sync.WaitGroup
	asideCtx, cancelAside := context.WithCancel(ctx)
	aside.Go(func() {
		(&watcher{role: supervisorRole, runDir: w.o.runDir, ctl: w.ctl, log: w.log}).run(asideCtx, stop)
	})
	b := &beater{w: w, stop: stop, pidfd: pidfd, held: newHold(cfg, w.ctl)}
	aside.Go(b.run)
	defer func() {
		cancelAside()
		_ = stop.Signal()
		aside.Wait()
		b.held.close()
	}()

	h, err := takeUserfaultfd(pidfd, cfg.RemoteFD)
	if errors.Is(err, errReleased) && w.ctl.phaseNow() == PhaseReleasing {
		return w.letGo(ctx, nil, pidfd)
	}
	if err != nil {
		return err
	}
	defer h.Close()
	if w.ctl.phaseNow() == PhaseReleasing {
		s := &server{cfg: cfg, ctl: w.ctl, h: h, pidfd: pidfd, lazy: cfg.lazy()}
		return w.letGo(ctx, s, pidfd)
	}
	if w.src == nil {
		if w.src, err = w.open(ctx, cfg.Source); err != nil {
			return err
		}
		defer func() {
			w.src.Close()
			w.src = nil
		}()
	}
	return w.serve(ctx, h, pidfd, b)
}

// serve arms (or takes over what is armed), serves until everything is in, and
// lets go.
func (w *worker) serve(ctx context.Context, h *uffd.Handle, pidfd int, b *beater) error {
	cfg := &w.st.Config
	s, err := newServer(cfg, w.ctl, h, w.src, pidfd)
	if err != nil {
		return err
	}
	defer s.close()
	s.onDamage = func(d *damage) error {
		if d.Pages == 0 {
			d = nil
		} else {
			w.log("%d pages cannot be had: %s: %s", d.Pages, d.First.Op, d.First.Cause)
		}
		return w.update(w.ctl.phaseNow(), func(st *state) { st.Damage = d })
	}
	maps, err := readMappings(cfg.QEMUPID, cfg.Blocks)
	if err != nil {
		return gone(err)
	}
	if err := s.prepare(maps); err != nil {
		return err
	}
	pm, err := pagemap.Open(cfg.QEMUPID)
	if err != nil {
		return gone(err)
	}
	defer pm.Close()
	again := w.ctl.phaseNow() >= PhaseServing
	if !again {
		var g errgroup.Group
		g.Go(func() error { return writeEager(ctx, cfg, w.src, pm, maps) })
		g.Go(func() error { return s.arm(pm) })
		if err := g.Wait(); err != nil {
			return errors.Join(err, s.unarm())
		}
		w.ctl.armedNS.Store(nowNS())
	} else {
		w.ctl.badPages.Store(0)
		w.ctl.undamage()
	}
	// From here on pages come in; a successor must not ask for proof that none is,
	// whether it learns of it from the control memory or from the file.
	if err := w.update(PhaseServing, func(*state) {}); err != nil {
		if !again {
			return err
		}
		w.log("%v", err) // the file says so already, and the guest waits
	}
	if !w.ctl.advance(PhaseServing) {
		return errSuperseded // by one that is further
	}

	inner, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for i := range cfg.Workers {
		wg.Go(func() { s.serve(inner, i) })
	}
	w.ctl.worker.works.Add(1)
	b.server.Store(s)
	defer b.server.Store(nil)
	wg.Go(func() {
		// Drainers start when it is known what there is to drain.
		err := s.load(inner)
		if err == nil && again {
			err = s.relearn(pm)
		}
		if err == nil {
			err = s.freeZeros(inner)
		}
		if err != nil {
			s.end(err)
			return
		}
		p := &pace{bytesPerSecond: cfg.BytesPerSecond}
		for i := range cfg.Drainers {
			wg.Go(func() { s.drainer(inner, i, p) })
		}
	})
	wg.Go(func() { s.retrier(inner) })
	if again {
		wg.Go(func() { s.rewake(inner) })
	}
	select {
	case err = <-s.fail:
	case <-ctx.Done():
		err = ctx.Err()
	}
	cancel()
	_ = s.stop.Signal()
	joined := make(chan struct{})
	go func() { wg.Wait(); close(joined) }()
	select {
	case <-joined:
	case <-time.After(joinLimit):
		// Somebody hangs in a read of the source that cannot be cancelled. This
		// process is about to end; the kernel joins the rest.
		if err == nil {
			<-joined
		}
		return errors.Join(err, errors.New("a read of the source hangs"))
	}
	if err != nil && !errors.Is(err, errReleased) {
		return err
	}
	if errors.Is(err, errReleased) && w.ctl.phaseNow() < PhaseReleasing {
		return problem.New(problem.Failed, opPageIn, fmt.Sprintf("pid %d", cfg.QEMUPID), "%w by somebody else before everything was in", err)
	}
	return w.letGo(ctx, s, pidfd)
}

const joinLimit = 2 * time.Second

// letGo unregisters, closes the descriptor inside and says so. s is nil if the
// descriptor is closed already. Each step may be repeated by a successor.
func (w *worker) letGo(ctx context.Context, s *server, pidfd int) error {
	cfg := &w.st.Config
	if w.ctl.drainedNS.Load() == 0 {
		w.ctl.drainedNS.Store(nowNS())
	}
	if err := w.update(PhaseReleasing, func(*state) {}); err != nil {
		w.log("%v", err)
	}
	w.ctl.advance(PhaseReleasing)
	if s != nil {
		if err := s.unarm(); err != nil {
			return gone(err)
		}
		if err := s.h.Close(); err != nil {
			w.log("%v", err)
		}
		if err := w.closeInside(ctx, cfg, pidfd); err != nil {
			if !alive(pidfd) {
				return uffd.ErrGone
			}
			// Nothing is registered: what remains is a number without effect.
			w.log("descriptor %d stays open inside: %v", cfg.RemoteFD, err)
			if uerr := w.update(PhaseReleasing, func(st *state) {
				st.Notes = append(st.Notes, fmt.Sprintf("userfaultfd %d stays open inside, without effect: %v", cfg.RemoteFD, err))
			}); uerr != nil {
				w.log("%v", uerr)
			}
		}
		if cfg.CollapseBudget > 0 && s.zero != nil {
			t0 := nowNS()
			w.ctl.collapsed.Store(s.collapse(cfg.CollapseBudget))
			w.ctl.collapseNS.Store(nowNS() - t0)
		}
	}
	w.ctl.doneNS.Store(nowNS())
	return w.finish(PhaseDone)
}

// closeInside closes the descriptor in the process served; another tracer may be in
// the way for a moment.
func (w *worker) closeInside(ctx context.Context, cfg *Config, pidfd int) error {
	var err error
	for pause := 10 * time.Millisecond; pause <= 640*time.Millisecond; pause *= 2 {
		if err = inject.CloseFD(ctx, cfg.QEMUPID, cfg.RemoteFD); err == nil {
			return nil
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
		if !alive(pidfd) {
			break
		}
	}
	return err
}

// rewake wakes every waiter a few more times: the predecessor may have read another
// fault in the very moment it was killed.
func (s *server) rewake(ctx context.Context) {
	for _, d := range []time.Duration{0, 20 * time.Millisecond, 100 * time.Millisecond, time.Second} {
		t := time.NewTimer(d)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		if err := s.wakeAll(); err != nil {
			s.end(gone(err))
			return
		}
	}
}
