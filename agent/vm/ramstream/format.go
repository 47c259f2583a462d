package ramstream

import (
	"errors"
	"fmt"
)

// Layout of the stream: migration/savevm.c and migration/ram.c of QEMU.
const (
	magic   = "QEVM"
	version = 3

	typeEOF        = 0x00
	typeStart      = 0x01
	typePart       = 0x02
	typeEnd        = 0x03
	typeFull       = 0x04
	typeSubsection = 0x05
	typeConfig     = 0x07
	typeCommand    = 0x08
	typeFooter     = 0x7e

	sectionName    = "ram"
	sectionVersion = 4

	// PageBytes is the unit of RAM in a stream of an x86 machine.
	PageBytes = 4096

	flagZero       = 0x02
	flagMemSize    = 0x04
	flagPage       = 0x08
	flagEOS        = 0x10
	flagContinue   = 0x20
	flagXBZRLE     = 0x40
	flagHook       = 0x80
	flagCompressed = 0x100
	flagMultifd    = 0x200
	flagMask       = PageBytes - 1
)

// Commands that say nothing about the state of the machine.
const (
	commandOpenReturnPath  = 1
	commandPing            = 2
	commandSwitchoverStart = 11
	maxCommandBytes        = 64
)

const (
	maxNameBytes    = 255
	maxMachineBytes = 255
)

// Block is a RAMBlock as a stream names it.
type Block struct {
	Name      string
	UsedBytes uint64
}

var (
	// ErrFormat is wrapped by every complaint about a stream's content.
	ErrFormat = errors.New("not a QEMU migration stream")
	// ErrTruncated says that a stream begins rightly and ends too early.
	ErrTruncated = fmt.Errorf("%w: it ends too early", ErrFormat)
	// ErrUnsupported says that a stream was written in a way that is not read here.
	ErrUnsupported = errors.New("this kind of migration stream is not supported")
)
