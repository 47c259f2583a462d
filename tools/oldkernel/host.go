package oldkernel

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/guest"
)

// hostNice is the emulator's priority.
const hostNice = -10

// maxReply bounds what one command may print.
const maxReply = 16 << 20

// Options of a machine with an old kernel.
type Options struct {
	Binary    string // the ckagent to put into it
	MemoryMiB int    // 640 if 0: with 384 the kernel runs out of memory while a checkpoint is buffered
	CPUs      int    // 2 if 0
}

// Host is a running machine with an old kernel.
type Host struct {
	dir  string
	cmd  *exec.Cmd
	done chan error // one value: how QEMU ended
	conn net.Conn   // its second serial port
	in   *bufio.Reader
}

// Reply is what a command did.
type Reply struct {
	Code        int
	Out, Stderr string
}

// Boot starts a machine and returns it once it takes commands.
func Boot(ctx context.Context, o Options) (h *Host, err error) {
	if o.MemoryMiB == 0 {
		o.MemoryMiB = 640
	}
	if o.CPUs == 0 {
		o.CPUs = 2
	}
	kernel, err := guest.LinuxKernel(ctx)
	if err != nil {
		return nil, err
	}
	h = &Host{done: make(chan error, 1)}
	if h.dir, err = os.MkdirTemp("", "oldkernel-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%w; console:\n%s", err, h.Console()), h.Close())
			h = nil
		}
	}()
	data, err := initramfs(ctx, o.Binary, kernel.Busybox)
	if err != nil {
		return h, err
	}
	initrd := filepath.Join(h.dir, "initrd")
	if err := os.WriteFile(initrd, data, 0o600); err != nil {
		return h, err
	}
	// We listen and QEMU connects, so there is nothing to wait for but the reply.
	listener, err := net.Listen("unix", filepath.Join(h.dir, "commands"))
	if err != nil {
		return h, err
	}
	defer listener.Close()
	log, err := os.Create(filepath.Join(h.dir, "messages"))
	if err != nil {
		return h, err
	}
	defer log.Close()
	h.cmd = exec.Command("qemu-system-x86_64", "-name", "oldkernel", "-nodefaults", "-no-user-config", "-display", "none",
		"-no-reboot", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", strconv.Itoa(o.MemoryMiB)+"M", "-smp", strconv.Itoa(o.CPUs),
		"-kernel", kernel.Vmlinux, "-initrd", initrd, "-append", guest.KernelArgs+" rdinit=/init",
		"-chardev", "file,id=console,path="+filepath.Join(h.dir, "console"), "-serial", "chardev:console",
		"-chardev", "socket,id=commands,path="+filepath.Join(h.dir, "commands"), "-serial", "chardev:commands")
	h.cmd.Stdout, h.cmd.Stderr = log, log
	// It must not outlive whoever started it.
	h.cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	if err := start(h.cmd, h.done); err != nil {
		h.cmd = nil
		return h, err
	}
	// Deadlines inside are real time. Of what shares this host's CPUs the emulator
	// comes first for the minute it needs; without the right it is only likelier
	// to miss some.
	_ = unix.Setpriority(unix.PRIO_PGRP, h.cmd.Process.Pid, hostNice)
	// With a session of its own it may be in a scheduling group of its own, whose
	// weight is what counts then.
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/autogroup", h.cmd.Process.Pid), []byte(strconv.Itoa(hostNice)), 0)
	if h.conn, err = accept(ctx, listener); err != nil {
		return h, err
	}
	h.in = bufio.NewReader(h.conn)
	_, err = h.reply(ctx)
	return h, err
}

// start starts the command on a thread of its own that lives as long as the
// child: a parent death signal is sent when the thread ends, not the process.
func start(cmd *exec.Cmd, done chan<- error) error {
	started := make(chan error)
	go func() { // joined by done
		runtime.LockOSThread() // and ends with this goroutine
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		done <- cmd.Wait()
	}()
	return <-started
}

func accept(ctx context.Context, l net.Listener) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	return l.Accept()
}

// Run runs one line of shell and waits until it has ended.
func (h *Host) Run(ctx context.Context, line string) (Reply, error) {
	if strings.ContainsAny(line, "\n\r") {
		return Reply{}, errors.New("oldkernel: a command is one line")
	}
	if _, err := io.WriteString(h.conn, line+"\n"); err != nil {
		return Reply{}, err
	}
	r, err := h.reply(ctx)
	if err != nil {
		return r, fmt.Errorf("%s: %w", line, err)
	}
	return r, nil
}

// reply reads one answer of init.
func (h *Host) reply(ctx context.Context) (r Reply, err error) {
	interrupted := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { interrupted <- h.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			err = errors.Join(ctx.Err(), err, <-interrupted)
		}
	}()
	head, err := h.in.ReadString('\n')
	if err != nil {
		return r, err
	}
	var out, stderr int
	if _, err := fmt.Sscanf(head, "@@ %d %d %d\n", &r.Code, &out, &stderr); err != nil || out < 0 || stderr < 0 || out+stderr > maxReply {
		return r, fmt.Errorf("oldkernel: %q is no answer", head)
	}
	both := make([]byte, out+stderr)
	if _, err := io.ReadFull(h.in, both); err != nil {
		return r, err
	}
	r.Out, r.Stderr = string(both[:out]), string(both[out:])
	return r, nil
}

// Console is what the kernel said, and QEMU.
func (h *Host) Console() string {
	var b strings.Builder
	for _, name := range []string{"console", "messages"} {
		data, err := os.ReadFile(filepath.Join(h.dir, name))
		if err == nil {
			b.Write(data)
		}
	}
	return b.String()
}

// Close ends the machine.
func (h *Host) Close() error {
	var errs []error
	if h.conn != nil {
		errs = append(errs, h.conn.Close())
	}
	if h.cmd != nil {
		if err := h.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			errs = append(errs, err)
		}
		<-h.done // killed, as wanted
	}
	return errors.Join(append(errs, os.RemoveAll(h.dir))...)
}
