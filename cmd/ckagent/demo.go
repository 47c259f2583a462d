package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/selfexe"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore"
	"github.com/ckagent/ckagent/tools/guest"
)

type demoOptions struct {
	dir    string
	qemu   string
	memory int
	rate   int
}

func newDemoCommand(a *app) *cobra.Command {
	var o demoOptions
	c := &cobra.Command{
		Use: "demo", Short: "Show it all: boot a guest, checkpoint it live, kill it, bring it back", Args: exactArgs(0, "no argument"),
		RunE: func(c *cobra.Command, _ []string) error { return runDemo(c.Context(), a, o) },
	}
	c.Flags().StringVar(&o.dir, "dir", "demo", "folder for the guest, its log and the store; nothing is written elsewhere but below /run/ckagent")
	c.Flags().StringVar(&o.qemu, "qemu", "qemu-system-x86_64", "QEMU binary")
	c.Flags().IntVar(&o.memory, "memory", 1024, "MiB of guest RAM; the guest keeps writing to half of it")
	c.Flags().IntVar(&o.rate, "rate", 10000, "pages the guest writes each second")
	return c
}

// demo is one telling of the story.
type demo struct {
	a      *app
	o      demoOptions
	dir    string
	serial string
	began  time.Time
}

func runDemo(ctx context.Context, a *app, o demoOptions) (err error) {
	d := &demo{a: a, o: o, began: time.Now()}
	if d.dir, err = filepath.Abs(o.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return problem.New(problem.Failed, "demo", d.dir, "%w", err)
	}
	run, err := os.MkdirTemp(d.dir, "run-")
	if err != nil {
		return problem.New(problem.Failed, "demo", d.dir, "%w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(run)) }()
	d.serial = filepath.Join(run, "console")
	return d.tell(ctx, run)
}

func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.a.out, "[%6.2fs] %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) tell(ctx context.Context, run string) (err error) {
	d.say("building a guest from Debian's packages (once, kept in the cache) ...")
	img, err := guest.Linux(ctx)
	if err != nil {
		return err
	}
	vm, err := d.boot(img, run)
	if err != nil {
		return err
	}
	defer func() {
		_ = vm.Process.Kill() // it is dead by then, unless the story ended early
		_ = vm.Wait()
	}()
	pid := vm.Process.Pid
	d.say("QEMU runs as pid %d, an ordinary command line, nothing prepared; waiting for the guest ...", pid)
	before, err := d.waitWork(ctx, work{}.newer)
	if err != nil {
		return err
	}
	d.say("the guest checks %d MiB of its memory against a pattern while it rewrites %d pages/s: %s", d.o.memory/2, d.o.rate, before)

	st, err := store.Open(filepath.Join(run, "store"))
	if err != nil {
		return err
	}
	v, err := agent.Attach(ctx, pid, agent.Options{Name: "demo"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	d.say("attached from outside")
	var res *capture.Result
	for range 2 {
		if res, err = v.Checkpoint(ctx, st, capture.Options{}); err != nil {
			return err
		}
		m := res.Manifest
		d.say("checkpoint %s: mode %s, pause %s (%s of it QEMU's device state), %s stored in %s, %d pages saved by %d faults",
			m.ID, m.Mode, durationText(time.Duration(m.Stats.PauseNS)), durationText(time.Duration(m.Stats.DeviceStateNS)),
			sizeText(m.Stats.StoredBytes), durationText(time.Duration(m.Stats.TotalNS)), m.Stats.CapturedPages, res.Capture.Faults)
	}
	after, err := d.waitWork(ctx, d.work().newer)
	if err != nil {
		return err
	}
	d.say("the guest did not notice: %s", after)
	if err := v.Rest(); err != nil {
		return err
	}

	d.say("kill -9 %d", pid)
	if err := vm.Process.Kill(); err != nil {
		return err
	}
	_ = vm.Wait() // killed, as wanted
	return d.bringBack(ctx, st, after)
}

// sweepPages is how many pages a second the guest has to verify to go through so much
// memory in about three seconds.
func sweepPages(mib int) int { return mib * 256 / 3 }

// boot starts an ordinary QEMU.
func (d *demo) boot(img guest.Image, run string) (*exec.Cmd, error) {
	log, err := os.Create(filepath.Join(run, "qemu.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	c := exec.Command(d.o.qemu, "-name", "demo", "-machine", "q35,accel=tcg", "-m", strconv.Itoa(d.o.memory)+"M",
		"-nodefaults", "-no-user-config", "-display", "none", "-kernel", img.Kernel, "-initrd", img.Initrd,
		"-append", fmt.Sprintf("%s GD_WS=%d GD_RATE=%d GD_SWEEP=%d", guest.KernelArgs, d.o.memory/2, d.o.rate, sweepPages(d.o.memory/2)),
		"-device", "virtio-rng-pci", "-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=",
		"-chardev", "file,id=s0,append=on,path="+d.serial, "-serial", "chardev:s0",
		"-qmp", "unix:"+filepath.Join(run, "qmp")+",server=on,wait=off")
	c.Stdout, c.Stderr = log, log
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return nil, problem.New(problem.Failed, "start", d.o.qemu, "%w", err).WithHint("apt-get install qemu-system-x86")
	}
	return c, nil
}

// bringBack restores the newest checkpoint and ends the restored VM after it has
// shown that it goes on.
func (d *demo) bringBack(ctx context.Context, st *store.Store, last work) error {
	if err := os.WriteFile(d.serial, nil, 0o600); err != nil { // what follows is the restored guest's
		return err
	}
	res, err := restore.Run(ctx, st, "demo", restore.Options{Self: selfexe.Path(), Detach: true})
	if res == nil {
		return err
	}
	defer endRestored(res)
	if err != nil {
		return err
	}
	d.say("restored from %s: QEMU up after %s, the guest ran %s later, with its memory still on disk", res.ID,
		durationText(time.Duration(res.ReadyNS)), durationText(time.Duration(res.ResumeNS)))
	first, err := d.waitWork(ctx, work{}.newer)
	if err != nil {
		return err
	}
	next, err := d.waitWork(ctx, first.newer)
	if err != nil {
		return err
	}
	d.say("the guest carries on where the checkpoint was: %s", next)
	// The sweep that was under way began before the checkpoint; the one after it
	// looks at every page in the restored memory.
	all, err := d.waitWork(ctx, func(w work) bool { return w.sweeps >= first.sweeps+2 || w.bad != 0 })
	if err != nil {
		return err
	}
	if all.bad != 0 {
		return problem.New(problem.Integrity, "demo", "guest", "%d pages are not what the guest wrote", all.bad)
	}
	d.say("it has gone through all of its memory since: %s. The end.", all)
	return nil
}

// endRestored ends the VM that this demo restored, by its process, and waits
// until it is gone.
func endRestored(res *restore.Result) {
	fd, err := unix.PidfdOpen(res.QEMUPID, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if e, err := qmp.ParseEndpoint(res.QMP); err == nil {
		if c, err := qmp.Dial(ctx, e); err == nil {
			_ = c.Execute(ctx, "quit", nil, nil) // if it does not, it is killed
			_ = c.Close()
		}
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, _ := unix.Poll(poll, 2000); n == 0 {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		_, _ = unix.Poll(poll, 2000)
	}
}

// work is what the guest said last about its work.
type work struct{ writes, bad, verified, sweeps uint64 }

func (w work) String() string {
	return fmt.Sprintf("%d pages written, %d verified, %d wrong", w.writes, w.verified, w.bad)
}

// newer reports whether the guest has written more by the time of n.
func (w work) newer(n work) bool { return n.writes > w.writes }

var workLine = regexp.MustCompile(`(?m)^WS w=(\d+) bad=(\d+) .*?v=(\d+) sweeps=(\d+)`)

// work reads the guest's last report; zero if there is none.
func (d *demo) work() (w work) {
	b, err := os.ReadFile(d.serial)
	if err != nil {
		return w
	}
	all := workLine.FindAllSubmatch(b, -1)
	if len(all) == 0 {
		return w
	}
	last := all[len(all)-1]
	for i, v := range []*uint64{&w.writes, &w.bad, &w.verified, &w.sweeps} {
		*v, _ = strconv.ParseUint(string(last[i+1]), 10, 64) // digits, by the expression
	}
	return w
}

// waitWork waits for a report of the guest that is enough.
func (d *demo) waitWork(ctx context.Context, enough func(work) bool) (work, error) {
	const patience = 2 * time.Minute
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if w := d.work(); enough(w) {
			return w, nil
		}
		select {
		case <-ctx.Done():
			return work{}, problem.New(problem.Failed, "demo", "guest", "it says nothing new on its console: %w", context.Cause(ctx)).
				WithHint("see %s", d.serial)
		case <-tick.C:
		}
	}
}
