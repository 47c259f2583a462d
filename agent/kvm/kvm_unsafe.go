//go:build amd64

package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
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

	apiVersion   = 12
	exitReasonAt = 8 // in the memory shared with a vCPU
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

// ExitHlt is the reason of a guest that halted.
const ExitHlt = 5

// Machine is a virtual machine whose memory begins at guest-physical 0, and its vCPU.
type Machine struct {
	vm, vcpu int
	run      []byte
}

// ErrNoMachine: not even a machine and a vCPU could be made.
var ErrNoMachine = errors.New("no virtual machine can be made")

// Open opens the device. It must be closed by unix.Close.
func Open() (device int, err error) {
	device, err = unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: "/dev/kvm", Err: err}
	}
	return device, nil
}

// CheckVersion refuses an interface other than the one there has been since 2007.
func CheckVersion(device int) error {
	if v, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(device), kvmGetAPIVersion, 0); errno != 0 || v != apiVersion {
		return fmt.Errorf("API version %d, not %d", v, apiVersion)
	}
	return nil
}

// New makes a machine of the memory, which stays the caller's, with a vCPU that begins
// in 16-bit mode at start, all segments at 0.
func New(device int, mem []byte, start uint64) (m *Machine, err error) {
	m = &Machine{vm: -1, vcpu: -1}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if m.vm, err = kvmFD(device, kvmCreateVM, 0); err != nil {
		return m, fmt.Errorf("%w: create machine: %w", ErrNoMachine, err)
	}
	region := kvmMemory{bytes: uint64(len(mem)), user: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if err := kvmIoctl(m.vm, kvmSetMemory, unsafe.Pointer(&region)); err != nil {
		return m, fmt.Errorf("%w: give it memory: %w", ErrNoMachine, err)
	}
	if m.vcpu, err = kvmFD(m.vm, kvmCreateVCPU, 0); err != nil {
		return m, fmt.Errorf("%w: create vCPU: %w", ErrNoMachine, err)
	}
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(device), kvmVCPUMmapBytes, 0)
	if errno != 0 {
		return m, fmt.Errorf("%w: vCPU size: %w", ErrNoMachine, errno)
	}
	if m.run, err = unix.Mmap(m.vcpu, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return m, fmt.Errorf("%w: map vCPU: %w", ErrNoMachine, err)
	}
	if err := setCPUID(device, m.vcpu); err != nil {
		return m, err
	}
	var s kvmSregs
	if err := kvmIoctl(m.vcpu, kvmGetSregs, unsafe.Pointer(&s)); err != nil {
		return m, fmt.Errorf("%w: read registers: %w", ErrNoMachine, err)
	}
	s.cs.base, s.cs.selector = 0, 0
	if err := kvmIoctl(m.vcpu, kvmSetSregs, unsafe.Pointer(&s)); err != nil {
		return m, fmt.Errorf("set segments: %w", err)
	}
	regs := kvmRegs{rip: start, rflags: 2}
	if err := kvmIoctl(m.vcpu, kvmSetRegs, unsafe.Pointer(&regs)); err != nil {
		return m, fmt.Errorf("set registers: %w", err)
	}
	return m, nil
}

// Run lets the guest run on the calling thread until it exits (0, see Exit) or a signal
// comes (EINTR).
func (m *Machine) Run() unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(m.vcpu), kvmRun, 0)
	return errno
}

// Exit is why the guest exited last.
func (m *Machine) Exit() uint32 { return binary.NativeEndian.Uint32(m.run[exitReasonAt:]) }

// Close ends the machine. No Run is under way.
func (m *Machine) Close() error {
	var errs []error
	if m.run != nil {
		errs = append(errs, unix.Munmap(m.run))
	}
	for _, fd := range []int{m.vcpu, m.vm} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	m.run, m.vcpu, m.vm = nil, -1, -1
	return errors.Join(errs...)
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
