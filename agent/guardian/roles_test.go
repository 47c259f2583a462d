package guardian

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/uffd"
)

// playServer is a fault server that serves nothing: it arms all guest RAM when told to
// on stdin ("arm"), or stops QEMU by signal again and again, as its programs in the
// kernel do ("throttle"), leaves beats, and lets go when its stdin ends; not if it
// throttles.
func playServer(qemu, control string) error {
	pid, _ := strconv.Atoi(qemu)
	f, err := os.OpenFile("/proc/self/fd/3", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	c, err := OpenControl(f)
	if err != nil {
		return err
	}
	c.BeatServer() // before the first, nobody watches for more
	go func() {
		for range time.Tick(20 * time.Millisecond) {
			c.BeatServer()
		}
	}()
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "arm":
			if err := armRAM(pid); err != nil {
				return err
			}
			fmt.Println("armed")
		case "throttle":
			if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
				return err
			}
			fmt.Println("throttling")
			for range time.Tick(time.Millisecond) {
				if unix.Kill(pid, unix.SIGSTOP) != nil {
					return nil // QEMU is gone, for nobody has ended us
				}
			}
		}
	}
	return nil
}

var armedHandle *uffd.Handle // kept until the process ends

func armRAM(pid int) error {
	f, _, err := inject.Userfaultfd(context.Background(), pid, inject.Options{})
	if err != nil {
		return err
	}
	h, err := uffd.Adopt(f, uffd.FeaturePagefaultFlagWP)
	if err != nil {
		return err
	}
	armedHandle = h
	p, err := vm.OpenProcess(pid)
	if err != nil {
		return err
	}
	defer p.Close()
	vmas, err := p.ReadSmaps()
	if err != nil {
		return err
	}
	for _, v := range vmas {
		if v.Is("dc") && v.Bytes() == guestRAM {
			if _, err := h.Register(v.Start, v.Bytes(), uffd.ModeWP); err != nil {
				return err
			}
			return h.WriteProtect(v.Start, v.Bytes())
		}
	}
	return fmt.Errorf("no guest RAM found in %d mappings", len(vmas))
}

const guestRAM = 64 << 20

// playAgent brings itself to a phase of a checkpoint, says so, and stays there,
// leaving beats, until its stdin ends; then it goes on in order.
func playAgent(qemu, socket, phase string) error {
	ctx := context.Background()
	pid, _ := strconv.Atoi(qemu)
	p, err := vm.OpenProcess(pid)
	if err != nil {
		return err
	}
	ep, err := qmp.ParseEndpoint(socket)
	if err != nil {
		return err
	}
	client, err := qmp.Dial(ctx, ep)
	if err != nil {
		return err
	}
	dup, err := client.DupFile()
	if err != nil {
		return err
	}
	c, page, err := CreateControl()
	if err != nil {
		return err
	}
	// The page is passed on as descriptor 3 of the fault server.
	server := exec.Command("/proc/self/exe", roleServer, qemu, "3")
	server.ExtraFiles = []*os.File{page}
	server.Stderr = os.Stderr
	orders, _ := server.StdinPipe()
	answers, _ := server.StdoutPipe()
	if err := server.Start(); err != nil {
		return err
	}
	g, err := Start(ctx, Config{Control: page, QEMU: p, QMP: dup, Endpoint: ep, Stderr: os.Stderr,
		FaultServerPID: server.Process.Pid})
	if err != nil {
		return err
	}
	go func() {
		for range time.Tick(BeatEvery) {
			c.BeatAgent()
		}
	}()
	c.BeatAgent()
	steps := agentSteps(ctx, c, client, dup, pid, func(order string) error {
		fmt.Fprintln(orders, order)
		if s, err := bufio.NewReader(answers).ReadString('\n'); err != nil {
			return fmt.Errorf("fault server: %q: %w", s, err)
		}
		return nil
	})
	if err := steps[phase](); err != nil {
		return fmt.Errorf("%s: %w", phase, err)
	}
	fmt.Printf("at %s guardian %d server %d\n", phase, g.PID(), server.Process.Pid)
	io.Copy(io.Discard, os.Stdin)
	orders.Close()
	server.Wait()
	return g.Stop(ctx)
}

// agentSteps maps a phase to what leads there from the start.
func agentSteps(ctx context.Context, c *Control, client *qmp.Client, dup *os.File, qemu int, tell func(order string) error) map[string]func() error {
	arm := func() error { return tell("arm") }
	raw := func(s string) error { _, err := dup.Write([]byte(s)); return err }
	engaged := func() error { c.Engaged.Store(1); return nil }
	stopped := func() error {
		engaged()
		c.Running.Store(1)
		c.Stopped.Store(1)
		return client.Execute(ctx, "stop", nil, nil)
	}
	then := func(first func() error, next func() error) func() error {
		return func() error {
			if err := first(); err != nil {
				return err
			}
			return next()
		}
	}
	return map[string]func() error{
		"idle":    func() error { return nil },
		"engaged": engaged,
		"half-stop": then(engaged, func() error {
			c.Running.Store(1)
			c.Stopped.Store(1)
			return raw(`{"execute":"st`)
		}),
		"stopped":   stopped,
		"armed":     then(stopped, arm),
		"half-cont": then(stopped, func() error { return raw(`{"execute":"cont","id":"ha`) }),
		"unread":    then(stopped, func() error { return raw(strings.Repeat(`{"execute":"query-qmp-schema"}`, 2)) }),
		"capturing": then(then(stopped, arm), func() error {
			if err := client.Execute(ctx, "cont", nil, nil); err != nil {
				return err
			}
			c.Stopped.Store(0)
			return nil
		}),
		"resumed": then(stopped, func() error {
			if err := client.Execute(ctx, "cont", nil, nil); err != nil {
				return err
			}
			c.Stopped.Store(0)
			return nil
		}),
		"sigstopped": then(stopped, func() error {
			c.SigStopped.Store(1)
			return unix.Kill(qemu, unix.SIGSTOP)
		}),
		"throttled": then(engaged, func() error {
			c.SigStopped.Store(1)
			return tell("throttle")
		}),
		"found-paused": func() error { // somebody else paused it before
			engaged()
			c.Running.Store(0)
			c.Stopped.Store(1)
			return client.Execute(ctx, "stop", nil, nil)
		},
	}
}
