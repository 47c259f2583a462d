package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// answerTime bounds how long a probe waits for its own program to answer.
const answerTime = 2 * time.Second

const (
	ringToken  = 0x636b6167656e7431
	timerToken = 0x636b6167656e7432
)

func capabilities(context.Context) (string, error) {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return "", fmt.Errorf("capget: %w", err)
	}
	has := func(c uint) bool { return data[c/32].Effective>>(c%32)&1 != 0 }
	switch {
	case has(unix.CAP_SYS_ADMIN):
		return "CAP_SYS_ADMIN", nil
	case has(unix.CAP_BPF) && has(unix.CAP_PERFMON):
		return "CAP_BPF, CAP_PERFMON", nil
	}
	return "", fmt.Errorf("neither CAP_SYS_ADMIN nor both CAP_BPF and CAP_PERFMON: %w", unix.EPERM)
}

func kernelBTF(context.Context) (string, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return "", err
	}
	var fn *btf.Typedef
	if err := spec.TypeByName("btf_trace_page_fault_user", &fn); err != nil {
		return "kernel types known; tracepoint page_fault_user is not among them", nil
	}
	return "kernel types known, tracepoint page_fault_user among them", nil
}

// pageFaultUser attaches the tracepoint program and has this process fault.
func pageFaultUser(context.Context) (string, error) {
	spec, err := loadObjects()
	if err != nil {
		return "", err
	}
	if err := spec.Variables["tgid"].Set(uint32(os.Getpid())); err != nil {
		return "", err
	}
	var o struct {
		Program *ebpf.Program  `ebpf:"page_fault_user"`
		Faults  *ebpf.Variable `ebpf:"user_faults"`
	}
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		return "", err
	}
	defer o.Program.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: o.Program})
	if err != nil {
		return "", err
	}
	defer l.Close()

	const pages = 16
	b, err := unix.Mmap(-1, 0, pages*os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return "", fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(b)
	if err := unix.Madvise(b, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		return "", fmt.Errorf("madvise: %w", err)
	}
	for i := 0; i < len(b); i += os.Getpagesize() {
		b[i] = 1
	}
	var seen uint64
	if err := o.Faults.Get(&seen); err != nil {
		return "", err
	}
	if seen < pages {
		return "", fmt.Errorf("the program saw %d of %d faults made for it", seen, pages)
	}
	return fmt.Sprintf("saw the %d faults made for it", pages), nil
}

func fentry(context.Context) (string, error) {
	spec, err := loadObjects()
	if err != nil {
		return "", err
	}
	var o struct {
		Program *ebpf.Program `ebpf:"fentry_getpgid"`
	}
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		return "", err
	}
	defer o.Program.Close()
	l, err := link.AttachTracing(link.TracingOptions{Program: o.Program})
	if err != nil {
		return "", err
	}
	defer l.Close()
	return "attached to a system call", nil
}

// tcx attaches to the loopback device of a network namespace of its own, on a
// thread that ends with it.
func tcx(context.Context) (string, error) {
	type answer struct {
		detail string
		err    error
	}
	c := make(chan answer, 1)
	go func() {
		// Never unlocked: the thread cannot return to the old namespace for
		// certain, so the runtime ends it with the goroutine.
		runtime.LockOSThread()
		d, err := tcxHere()
		c <- answer{d, err}
	}()
	a := <-c
	return a.detail, a.err
}

func tcxHere() (string, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return "", fmt.Errorf("new network namespace: %w", err)
	}
	spec, err := loadObjects()
	if err != nil {
		return "", err
	}
	var o struct {
		Program *ebpf.Program `ebpf:"tcx_pass"`
	}
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		return "", err
	}
	defer o.Program.Close()
	const loopback = 1 // the only device of a new namespace
	l, err := link.AttachTCX(link.TCXOptions{Interface: loopback, Program: o.Program, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return "", err
	}
	defer l.Close()
	return "attached to a device", nil
}

func ringBuffer(ctx context.Context) (string, error) {
	spec, err := loadObjects()
	if err != nil {
		return "", err
	}
	var o struct {
		Program *ebpf.Program `ebpf:"ring_write"`
		Ring    *ebpf.Map     `ebpf:"ring"`
	}
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		return "", err
	}
	defer o.Program.Close()
	defer o.Ring.Close()
	if err := runAndExpect(ctx, o.Program, o.Ring, ringToken); err != nil {
		return "", err
	}
	return "a record went through", nil
}

func bpfTimer(ctx context.Context) (string, error) {
	spec, err := loadObjects()
	if err != nil {
		return "", err
	}
	var o struct {
		Program *ebpf.Program `ebpf:"timer_start"`
		Ring    *ebpf.Map     `ebpf:"ring"`
		Timers  *ebpf.Map     `ebpf:"timers"`
	}
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		return "", err
	}
	defer o.Program.Close()
	defer o.Ring.Close()
	defer o.Timers.Close()
	if err := runAndExpect(ctx, o.Program, o.Ring, timerToken); err != nil {
		return "", err
	}
	return "a timer fired", nil
}

// runAndExpect runs a classifier program once, on a made-up packet, and waits
// for the record it is to cause.
func runAndExpect(ctx context.Context, p *ebpf.Program, ring *ebpf.Map, token uint64) error {
	r, err := ringbuf.NewReader(ring)
	if err != nil {
		return err
	}
	defer r.Close()
	packet := make([]byte, 64)
	ret, err := p.Run(&ebpf.RunOptions{Data: packet})
	if err != nil {
		return err
	}
	if ret != 0 {
		return fmt.Errorf("the program answered %d", int32(ret))
	}
	deadline := time.Now().Add(answerTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	r.SetDeadline(deadline)
	rec, err := r.Read()
	if err != nil {
		return fmt.Errorf("no record arrived: %w", err)
	}
	if len(rec.RawSample) < 8 || binary.NativeEndian.Uint64(rec.RawSample) != token {
		return fmt.Errorf("wrong record % x", rec.RawSample)
	}
	return nil
}
