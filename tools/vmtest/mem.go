package vmtest

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// ReadRAM copies n bytes of a process's memory from host virtual address hva,
// through /proc/PID/mem: independent of everything ckagent uses.
func ReadRAM(pid int, hva, n uint64) ([]byte, error) {
	buf := make([]byte, n)
	return buf, ReadRAMInto(pid, hva, buf)
}

// ReadRAMInto is ReadRAM into memory that is there already: in a pause, fresh
// memory costs more than the copy.
func ReadRAMInto(pid int, hva uint64, buf []byte) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.ReadAt(buf, int64(hva)); err != nil {
		return fmt.Errorf("read %d bytes at %#x of pid %d: %w", len(buf), hva, pid, err)
	}
	return nil
}

// WriteRAM overwrites a process's memory: the way to break a guest on purpose.
func WriteRAM(pid int, hva uint64, data []byte) error {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(data, int64(hva)); err != nil {
		return fmt.Errorf("write %d bytes at %#x of pid %d: %w", len(data), hva, pid, err)
	}
	return nil
}

// A Mapping is one line of /proc/PID/smaps with its flags.
type Mapping struct {
	Start, End uint64
	Perm, Path string
	Flags      []string // of the VmFlags line
	RSSKiB     uint64
	HugeKiB    uint64 // AnonHugePages
}

// Mappings reads a process's smaps.
func Mappings(pid int) ([]Mapping, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return nil, err
	}
	var out []Mapping
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		words := strings.Fields(s.Text())
		if len(words) >= 5 && strings.Contains(words[0], "-") && !strings.HasSuffix(words[0], ":") {
			from, to, _ := strings.Cut(words[0], "-")
			start, err1 := strconv.ParseUint(from, 16, 64)
			end, err2 := strconv.ParseUint(to, 16, 64)
			if err1 != nil || err2 != nil {
				return nil, fmt.Errorf("smaps of pid %d: %q", pid, s.Text())
			}
			out = append(out, Mapping{Start: start, End: end, Perm: words[1], Path: strings.Join(words[5:], " ")})
			continue
		}
		if len(out) == 0 || len(words) < 2 {
			continue
		}
		m := &out[len(out)-1]
		switch words[0] {
		case "VmFlags:":
			m.Flags = words[1:]
		case "Rss:":
			m.RSSKiB, _ = strconv.ParseUint(words[1], 10, 64)
		case "AnonHugePages:":
			m.HugeKiB, _ = strconv.ParseUint(words[1], 10, 64)
		}
	}
	return out, nil
}

// MainRAM is where the guest's RAM lies in QEMU: the mapping of exactly its size
// that QEMU excluded from fork or marked as guest memory.
func (v *VM) MainRAM() (hva, bytes uint64, err error) {
	maps, err := Mappings(v.pid)
	if err != nil {
		return 0, 0, err
	}
	want := uint64(v.cfg.MemoryMiB) << 20
	for _, m := range maps {
		for _, f := range m.Flags {
			if f == "dc" && m.End-m.Start == want { // MADV_DONTFORK: QEMU does it to guest memory
				return m.Start, want, nil
			}
		}
	}
	return 0, 0, fmt.Errorf("pid %d has no mapping of %d MiB kept out of fork", v.pid, v.cfg.MemoryMiB)
}
