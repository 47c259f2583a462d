package proving

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/kvm"
)

// A guest of the subject's: 1 MiB, of which it writes what 16-bit code reaches behind
// its first 64 KiB.
const (
	guestPages = 256
	guestStart = 0x1000
)

// guestCode writes pages from 0x10000 on up to 0xf0000, each time with another word.
var guestCode = []byte{
	0x31, 0xdb, // xor %bx,%bx
	0x43,             // inc %bx
	0xba, 0x00, 0x10, // mov $0x1000,%dx
	0x8e, 0xc2, // mov %dx,%es
	0x31, 0xff, // xor %di,%di
	0x89, 0xd8, // mov %bx,%ax
	0xb9, 0x00, 0x80, // mov $0x8000,%cx
	0xf3, 0xab, // rep stosw
	0x81, 0xc2, 0x00, 0x10, // add $0x1000,%dx
	0x81, 0xfa, 0x00, 0xf0, // cmp $0xf000,%dx
	0x75, 0xeb, // jne: the next segment
	0xeb, 0xe5, // jmp: all anew
}

// startGuest runs the guest in the memory until the process ends.
func startGuest(mem []byte, failed chan<- error) error {
	copy(mem[guestStart:], guestCode)
	device, err := kvm.Open()
	if err != nil {
		return err
	}
	m, err := kvm.New(device, mem, guestStart)
	if err != nil {
		return err
	}
	go func() {
		runtime.LockOSThread()
		for {
			switch errno := m.Run(); errno {
			case unix.EINTR: // a signal of the runtime's, or a stop that is over
			case 0:
				failed <- fmt.Errorf("the guest exited with reason %d", m.Exit())
				return
			default:
				failed <- fmt.Errorf("run the guest: %w", errno)
				return
			}
		}
	}()
	return nil
}
