package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/uffd"
)

// SuperviseMain is the supervisor process: it replaces a worker that died or shows
// no sign of life. args are what follows the verb. It reads neither the source nor
// the memory served, so that nothing that harms a worker can harm it; but it holds
// the source by the keeper of its kind, if there is one, so that the source is not
// removed while there is no worker.
func SuperviseMain(ctx context.Context, args []string, keepers map[string]Keeper) error {
	o, err := parseOptions(VerbSupervisor, args)
	if err != nil {
		return err
	}
	ctl, err := openControl(os.NewFile(controlFD, controlMapping))
	if err != nil {
		return problem.New(problem.Failed, "start", VerbSupervisor, "%w", err)
	}
	defer ctl.close()
	protect()
	defer cgroup.Join(groupName(supervisorRole.name, os.Getpid())).Leave()
	if !o.resume && !holdLeash() {
		return nil
	}
	err = supervise(ctx, o, ctl, keepers)
	cgroup.Sweep()
	return err
}

func supervise(ctx context.Context, o *options, ctl *control, keepers map[string]Keeper) error {
	log := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%s pagerd[%d]: %s\n", time.Now().Format(time.RFC3339Nano), os.Getpid(), fmt.Sprintf(format, args...))
	}
	st, err := loadState(o.runDir)
	if err != nil {
		log("%v", err)
		return err
	}
	self, err := myself()
	if err != nil {
		return err
	}
	me := &ctl.supervisor
	if !me.claim(unpack(o.old), self, nowNS()) {
		return nil
	}
	me.works.Add(1)
	pidfd, err := openTarget(&st.Config)
	if errors.Is(err, uffd.ErrGone) {
		if !ctl.phaseNow().over() {
			ctl.advance(PhaseGone)
		}
		return nil
	}
	if err != nil {
		// Whether it lives is not known, and its guest needs the worker if it does: that
		// one starts another of us.
		log("%v", err)
		return err
	}
	defer unix.Close(pidfd)
	stop, err := uffd.NewStop()
	if err != nil {
		return err
	}
	defer stop.Close()

	letGo := func() {}
	if keeper, ok := keepers[st.Config.Source.Kind]; ok {
		letGo = sync.OnceFunc(keep(ctx, keeper, st.Config.Source.Params, log))
	}
	defer func() { letGo() }() // whatever it is by then
	watched := make(chan struct{})
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := &watcher{role: workerRole, runDir: o.runDir, ctl: ctl, log: log}
	go func() {
		defer close(watched)
		w.run(wctx, stop)
	}()
	for ctx.Err() == nil && !ctl.phaseNow().over() && me.occupant() == self {
		me.beatNS.Store(nowNS())
		if await(beatEvery, stop.FD(), pidfd) == 0 {
			break
		}
	}
	superseded := me.occupant() != self
	cancel()
	_ = stop.Signal()
	<-watched
	if superseded {
		return nil
	}
	if !alive(pidfd) && !ctl.phaseNow().over() {
		ctl.advance(PhaseGone)
	}
	awaitExit(ctl.worker.occupant(), lastWords)
	w.reap()
	letGo() // who waits for the files to go may ask for the source next
	if ctl.has(flagDetached) && ctl.phaseNow().over() {
		cleanUp(o.runDir)
	}
	return nil
}

const lastWords = 3 * time.Second

// awaitExit returns when a process has ended, or after d.
func awaitExit(o occupant, d time.Duration) {
	fd, err := unix.PidfdOpen(o.PID, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if !o.exists() {
		return
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	_, _ = unix.Poll(fds, int(d/time.Millisecond))
}
