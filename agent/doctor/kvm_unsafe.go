//go:build amd64

package doctor

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and layouts of include/uapi/linux/kvm.h and asm/kvm.h, x86-64.
const (
	kvmGetAPIVersion = 0xAE00
	kvmCreateVM      = 0xAE01
	kvmVCPUMmapBytes = 0xAE04
	kvmCreateVCPU    = 0xAE41
	kvmRun           = 0xAE80
	kvmSetMemory     = 0x4020AE46
	kvmGetSregs      = 0x8138AE83
	kvmSetSregs      = 0x4138AE84
	kvmSetRegs       = 0x4090AE82
	kvmSupported     = 0xC008AE05 // KVM_GET_SUPPORTED_CPUID
	kvmSetCPUID      = 0x4008AE90

	kvmAPIVersion = 12
	kvmExitHlt    = 5
)

type kvmMemory struct {
	slot, flags        uint32
	guest, bytes, user uint64
}

type kvmSegment struct {
	base                            uint64
	limit                           uint32
	selector                        uint16
	kind, present, dpl, db, s, l, g uint8
	avl, unusable, _                uint8
}

type kvmTable struct {
	base  uint64
	limit uint16
	_     [3]uint16
}

type kvmSregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt kvmSegment
	gdt, idt                        kvmTable
	cr0, cr2, cr3, cr4, cr8         uint64
	efer, apicBase                  uint64
	interrupts                      [4]uint64
}

type kvmRegs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp    uint64
	r8, r9, r10, r11, r12, r13, r14, r15, rip uint64
	rflags                                    uint64
}

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
	dev, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		k.OpenErr = fmt.Errorf("/dev/kvm: %w", err)
		return k
	}
	defer unix.Close(dev)
	if v, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), kvmGetAPIVersion, 0); errno != 0 || v != kvmAPIVersion {
		k.CreateErr = fmt.Errorf("API version %d, not %d", v, kvmAPIVersion)
		return k
	}
	var created bool
	created, k.RealErr = runGuest(ctx, dev, real16)
	if !created {
		k.CreateErr, k.RealErr = k.RealErr, nil
		return k
	}
	if k.RealErr == nil {
		_, k.LongErr = runGuest(ctx, dev, long64)
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
// mode up to its hlt, by when it must have stored guestToken. created is false
// if not even that far.
func runGuest(ctx context.Context, dev int, code []byte) (created bool, err error) {
	vm, err := kvmFD(dev, kvmCreateVM, 0)
	if err != nil {
		return false, fmt.Errorf("create machine: %w", err)
	}
	defer unix.Close(vm)
	mem, err := unix.Mmap(-1, 0, guestBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return false, fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(mem)
	copy(mem[guestCode:], code)
	le := binary.LittleEndian
	const presentWrite, pageSize2M = 3, 0x80
	le.PutUint64(mem[guestPML4:], guestPDPT|presentWrite)
	le.PutUint64(mem[guestPDPT:], guestPD|presentWrite)
	le.PutUint64(mem[guestPD:], presentWrite|pageSize2M)

	region := kvmMemory{bytes: guestBytes, user: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if err := kvmIoctl(vm, kvmSetMemory, unsafe.Pointer(&region)); err != nil {
		return false, fmt.Errorf("give it memory: %w", err)
	}
	vcpu, err := kvmFD(vm, kvmCreateVCPU, 0)
	if err != nil {
		return false, fmt.Errorf("create vCPU: %w", err)
	}
	defer unix.Close(vcpu)
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), kvmVCPUMmapBytes, 0)
	if errno != 0 {
		return false, fmt.Errorf("vCPU size: %w", errno)
	}
	run, err := unix.Mmap(vcpu, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return false, fmt.Errorf("map vCPU: %w", err)
	}
	defer unix.Munmap(run)

	if err := setCPUID(dev, vcpu); err != nil {
		return true, err
	}
	var s kvmSregs
	if err := kvmIoctl(vcpu, kvmGetSregs, unsafe.Pointer(&s)); err != nil {
		return false, fmt.Errorf("read registers: %w", err)
	}
	s.cs.base, s.cs.selector = 0, 0
	if err := kvmIoctl(vcpu, kvmSetSregs, unsafe.Pointer(&s)); err != nil {
		return true, fmt.Errorf("set segments: %w", err)
	}
	regs := kvmRegs{rip: guestCode, rflags: 2}
	if err := kvmIoctl(vcpu, kvmSetRegs, unsafe.Pointer(&regs)); err != nil {
		return true, fmt.Errorf("set registers: %w", err)
	}
	if err := runVCPU(ctx, vcpu); err != nil {
		return true, err
	}
	const exitReasonAt = 8
	if why := le.Uint32(run[exitReasonAt:]); why != kvmExitHlt {
		return true, fmt.Errorf("stopped with exit reason %d instead of halting", why)
	}
	if got := le.Uint16(mem[guestResult:]); got != guestToken {
		return true, fmt.Errorf("halted with the result %#x instead of %#x", got, guestToken)
	}
	return true, nil
}

// setCPUID gives the vCPU every feature the host offers: without the one for
// long mode a guest may not switch to it.
func setCPUID(dev, vcpu int) error {
	const entries = 256
	list := struct {
		n, _    uint32
		entries [entries][10]uint32
	}{n: entries}
	if err := kvmIoctl(dev, kvmSupported, unsafe.Pointer(&list)); err != nil {
		return fmt.Errorf("ask for CPU features: %w", err)
	}
	if err := kvmIoctl(vcpu, kvmSetCPUID, unsafe.Pointer(&list)); err != nil {
		return fmt.Errorf("set CPU features: %w", err)
	}
	return nil
}

// runVCPU is KVM_RUN with a deadline: past it the thread inside is interrupted
// by a signal, which makes the kernel return.
func runVCPU(ctx context.Context, vcpu int) error {
	type answer struct{ errno unix.Errno }
	done, tid := make(chan answer, 1), make(chan int, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- unix.Gettid()
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(vcpu), kvmRun, 0)
		done <- answer{errno}
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
				return runVCPU(ctx, vcpu)
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

func kvmFD(fd int, request, arg uintptr) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	if errno != 0 {
		return -1, errno
	}
	unix.CloseOnExec(int(n))
	return int(n), nil
}

func kvmIoctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
