//go:build amd64

package doctor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/kvm"
)

// Guest memory: page tables for an identity map of the first 2 MiB, then code.
const (
	guestBytes = 64 << 10
	guestPML4  = 0x1000
	guestPDPT  = 0x2000
	guestPD    = 0x3000
	guestCode  = 0x4000

	guestResult = 0x6000
	guestToken  = 0xcdef
)

// real16 stores the token and halts.
var real16 = []byte{
	0x31, 0xc0, // xor %ax,%ax
	0x8e, 0xd8, // mov %ax,%ds
	0xb8, 0xef, 0xcd, // mov $0xcdef,%ax
	0xa3, 0x00, 0x60, // mov %ax,0x6000
	0xf4, // hlt
}

// long64 does what the boot code of every 64-bit kernel does: it goes from
// 16-bit mode to long mode by itself. Setting a vCPU up in long mode from
// outside would prove less: there are nested hypervisors that run such code but
// no kernel that has to get there.
var long64 = []byte{
	0x31, 0xc0, // xor %ax,%ax
	0x8e, 0xd8, // mov %ax,%ds
	0x66, 0x0f, 0x01, 0x16, 0x88, 0x40, // lgdtl gdtr
	0x0f, 0x20, 0xe0, // mov %cr4,%eax
	0x66, 0x83, 0xc8, 0x20, // or $PAE,%eax
	0x0f, 0x22, 0xe0, // mov %eax,%cr4
	0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, // mov $PML4,%eax
	0x0f, 0x22, 0xd8, // mov %eax,%cr3
	0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0, // mov $EFER,%ecx
	0x0f, 0x32, // rdmsr
	0x66, 0x0d, 0x00, 0x01, 0x00, 0x00, // or $LME,%eax
	0x0f, 0x30, // wrmsr
	0x0f, 0x20, 0xc0, // mov %cr0,%eax
	0x66, 0x0d, 0x01, 0x00, 0x00, 0x80, // or $(PG|PE),%eax
	0x0f, 0x22, 0xc0, // mov %eax,%cr0
	0x66, 0xea, 0x41, 0x40, 0x00, 0x00, 0x08, 0x00, // ljmpl $8,$0x4041
	// 64-bit from here, at 0x4041
	0xb8, 0x10, 0x00, 0x00, 0x00, // mov $16,%eax
	0x8e, 0xd8, // mov %eax,%ds
	0x8e, 0xd0, // mov %eax,%ss
	0x48, 0xb8, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, // movabs $0x123456789abcdef,%rax
	0x48, 0x89, 0x04, 0x25, 0x00, 0x60, 0x00, 0x00, // mov %rax,0x6000
	0xf4, // hlt
	0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
	// the descriptor table, at 0x4070: null, 64-bit code, data
	0, 0, 0, 0, 0, 0, 0, 0,
	0xff, 0xff, 0, 0, 0, 0x9b, 0xaf, 0,
	0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0,
	// gdtr, at 0x4088
	0x17, 0x00, 0x70, 0x40, 0x00, 0x00,
}

func gatherKVM(ctx context.Context) KVMFacts {
	var k KVMFacts
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		f := cpuFlags(string(b))
		k.Nested, k.Hardware = f["hypervisor"], f["vmx"] || f["svm"]
	}
	dev, err := kvm.Open()
	if err != nil {
		k.OpenErr = err
		return k
	}
	defer unix.Close(dev)
	if k.CreateErr = kvm.CheckVersion(dev); k.CreateErr != nil {
		return k
	}
	k.RealErr = runGuest(ctx, dev, real16)
	if errors.Is(k.RealErr, kvm.ErrNoMachine) {
		k.CreateErr, k.RealErr = k.RealErr, nil
		return k
	}
	if k.RealErr == nil {
		k.LongErr = runGuest(ctx, dev, long64)
	}
	return k
}

// cpuFlags are the features of the first CPU in /proc/cpuinfo.
func cpuFlags(cpuinfo string) map[string]bool {
	out := map[string]bool{}
	for line := range strings.Lines(cpuinfo) {
		if k, v, _ := strings.Cut(line, ":"); strings.TrimSpace(k) == "flags" {
			for f := range strings.FieldsSeq(v) {
				out[f] = true
			}
			break
		}
	}
	return out
}

// runGuest makes a virtual machine with one vCPU that executes code in 16-bit
// mode up to its hlt, by when it must have stored guestToken. kvm.ErrNoMachine
// if it does not even come to that.
func runGuest(ctx context.Context, dev int, code []byte) (err error) {
	mem, err := unix.Mmap(-1, 0, guestBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(mem)
	copy(mem[guestCode:], code)
	le := binary.LittleEndian
	const presentWrite, pageSize2M = 3, 0x80
	le.PutUint64(mem[guestPML4:], guestPDPT|presentWrite)
	le.PutUint64(mem[guestPDPT:], guestPD|presentWrite)
	le.PutUint64(mem[guestPD:], presentWrite|pageSize2M)
	m, err := kvm.New(dev, mem, guestCode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := runVCPU(ctx, m); err != nil {
		return err
	}
	if why := m.Exit(); why != kvm.ExitHlt {
		return fmt.Errorf("stopped with exit reason %d instead of halting", why)
	}
	if got := le.Uint16(mem[guestResult:]); got != guestToken {
		return fmt.Errorf("halted with the result %#x instead of %#x", got, guestToken)
	}
	return nil
}

// runVCPU is KVM_RUN with a deadline: past it the thread inside is interrupted
// by a signal, which makes the kernel return.
func runVCPU(ctx context.Context, m *kvm.Machine) error {
	type answer struct{ errno unix.Errno }
	done, tid := make(chan answer, 1), make(chan int, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- unix.Gettid()
		done <- answer{m.Run()}
	}()
	thread := <-tid
	limit := time.NewTimer(stepTime / 5)
	defer limit.Stop()
	expired := false
	stop := ctx.Done()
	for {
		select {
		case a := <-done:
			switch {
			case a.errno == unix.EINTR && expired:
				return fmt.Errorf("does not come to an end: %w", unix.ETIMEDOUT)
			case a.errno == unix.EINTR:
				// Go's own preemption signal; too rare to matter, but then
				// the vCPU simply goes on.
				return runVCPU(ctx, m)
			case a.errno != 0:
				return fmt.Errorf("run: %w", a.errno)
			}
			return nil
		case <-limit.C:
		case <-stop:
			stop = nil
		}
		expired = true
		// SIGURG is what the Go runtime itself interrupts threads with; it is
		// handled and without effect. Repeated, in case it came too early.
		_ = unix.Tgkill(os.Getpid(), thread, unix.SIGURG)
		limit.Reset(50 * time.Millisecond)
	}
}
