package vm

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// Bounds of what QEMU may answer: 4096 RAM blocks is far above the 256 memory
// slots and 32 PCI functions a bus that make blocks.
const (
	maxBlocks     = 4096
	maxFlatRanges = 1 << 16
	maxHMPBytes   = 32 << 20
)

// errHMP is wrapped by every error about monitor output that was not understood.
var errHMP = errors.New("monitor output not understood")

// ramblockLine is one line of `info ramblock`.
type ramblockLine struct {
	name                string
	pageBytes           uint64
	offset, used, total uint64
	hva                 uint64 // 0 when this QEMU does not tell
	readOnly            bool   // only with hva
}

// Names of blocks hold blanks rarely but may ("/rom@etc/acpi/tables" does not;
// an -object id cannot; a device path can hold anything), hence the lazy match
// up to the page size column. The name is right-aligned.
var ramblockRE = regexp.MustCompile(`^\s*(\S.*?)\s+(\d+) ([KMGTPE]iB|B)\s+0x([0-9a-f]{16}) 0x([0-9a-f]{16}) 0x([0-9a-f]{16})(?: 0x([0-9a-f]{16})\s+(ro|rw))?\s*$`)

// parseRAMBlocks reads `info ramblock`: name, page size, offset, used and total,
// and since 8.2 host address and access.
func parseRAMBlocks(text string) ([]ramblockLine, error) {
	if len(text) > maxHMPBytes {
		return nil, fmt.Errorf("info ramblock: %w: %d bytes", errHMP, len(text))
	}
	var out []ramblockLine
	seen := make(map[string]bool)
	header := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		if strings.TrimSpace(line) == "" {
			continue
		}
		if !header {
			if f := strings.Fields(line); len(f) < 6 || f[0] != "Block" || f[1] != "Name" {
				return nil, fmt.Errorf("info ramblock: %w: heading %.120q", errHMP, line)
			}
			header = true
			continue
		}
		m := ramblockRE.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("info ramblock: %w: %.160q", errHMP, line)
		}
		b := ramblockLine{name: m[1], readOnly: m[8] == "ro"}
		n, err := strconv.ParseUint(m[2], 10, 32)
		shift, ok := map[string]uint{"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[m[3]]
		if err != nil || !ok || n == 0 {
			return nil, fmt.Errorf("info ramblock: %w: page size in %.160q", errHMP, line)
		}
		b.pageBytes = n << shift
		for i, dst := range []*uint64{&b.offset, &b.used, &b.total, &b.hva} {
			if m[4+i] == "" {
				continue
			}
			if *dst, err = strconv.ParseUint(m[4+i], 16, 64); err != nil {
				return nil, fmt.Errorf("info ramblock: %w: %.160q", errHMP, line)
			}
		}
		switch {
		case b.used > b.total || b.total == 0:
			return nil, fmt.Errorf("info ramblock: %w: sizes in %.160q", errHMP, line)
		case b.pageBytes < 4096 || b.pageBytes&(b.pageBytes-1) != 0:
			return nil, fmt.Errorf("info ramblock: %w: page size in %.160q", errHMP, line)
		case seen[b.name]:
			return nil, fmt.Errorf("info ramblock: %w: block %q twice", errHMP, b.name)
		case len(out) >= maxBlocks:
			return nil, fmt.Errorf("info ramblock: %w: more than %d blocks", errHMP, maxBlocks)
		}
		seen[b.name] = true
		out = append(out, b)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("info ramblock: %w: no block", errHMP)
	}
	return out, nil
}

// flatRange is one RAM range of the guest's physical address space.
type flatRange struct {
	gpa, bytes uint64
	kind       string // ram, rom, romd, nv-ram, ...
	region     string // MemoryRegion name, not the RAMBlock's
	offset     uint64 // of the range within the region
}

// A range of `info mtree -f`: addresses, priority and kind, the region's name,
// the offset into it unless 0, and marks such as " KVM" or " owner:...".
var flatRE = regexp.MustCompile(`^\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([a-z/-]+)\): (.*)$`)

var flatTailRE = regexp.MustCompile(`^(.*?)(?: @([0-9a-f]{16}))?(?: KVM| HVF| WHPX| NVMM)?(?: (?:owner|parent):\{.*\})*$`)

// parseFlatView returns the RAM ranges of the address space "memory", the view
// that devices and (outside system management mode) vCPUs have.
func parseFlatView(text string) ([]flatRange, error) {
	if len(text) > maxHMPBytes {
		return nil, fmt.Errorf("info mtree -f: %w: %d bytes", errHMP, len(text))
	}
	var out []flatRange
	found, inside, took := false, false, false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "FlatView #"):
			inside, took = false, took || inside
			continue
		case strings.HasPrefix(line, ` AS "memory", root:`):
			inside, found = !took, true
			continue
		case !inside:
			continue
		}
		m := flatRE.FindStringSubmatch(line)
		if m == nil {
			continue // headings: "Root memory region", further address spaces
		}
		switch m[3] {
		case "ram", "rom", "romd", "nv-ram", "nv-rom", "ramd":
		default:
			continue // i/o, container
		}
		from, err1 := strconv.ParseUint(m[1], 16, 64)
		to, err2 := strconv.ParseUint(m[2], 16, 64)
		tail := flatTailRE.FindStringSubmatch(m[4])
		if err1 != nil || err2 != nil || to < from || to-from == ^uint64(0) || tail == nil || tail[1] == "" {
			return nil, fmt.Errorf("info mtree -f: %w: %.160q", errHMP, line)
		}
		r := flatRange{gpa: from, bytes: to - from + 1, kind: m[3], region: tail[1]}
		if tail[2] != "" {
			if r.offset, err1 = strconv.ParseUint(tail[2], 16, 64); err1 != nil {
				return nil, fmt.Errorf("info mtree -f: %w: %.160q", errHMP, line)
			}
		}
		if len(out) >= maxFlatRanges {
			return nil, fmt.Errorf("info mtree -f: %w: more than %d ranges", errHMP, maxFlatRanges)
		}
		out = append(out, r)
	}
	if !found {
		return nil, fmt.Errorf("info mtree -f: %w: no address space \"memory\"", errHMP)
	}
	return out, nil
}

var gpa2hvaRE = regexp.MustCompile(`^Host virtual address for 0x([0-9a-f]{1,16}) \((.*)\) is 0x([0-9a-f]{1,16})\s*$`)

// parseGPA2HVA reads the answer of `gpa2hva`: the region's name and the host
// address. ok is false when nothing is mapped there.
func parseGPA2HVA(text string, gpa uint64) (region string, hva uint64, ok bool, err error) {
	text = strings.TrimRight(text, "\r\n")
	if strings.HasPrefix(text, "No memory is mapped at address") ||
		strings.HasPrefix(text, "Memory at address") { // "... is not RAM"
		return "", 0, false, nil
	}
	m := gpa2hvaRE.FindStringSubmatch(text)
	if m == nil {
		return "", 0, false, fmt.Errorf("gpa2hva: %w: %.160q", errHMP, text)
	}
	got, err1 := strconv.ParseUint(m[1], 16, 64)
	hva, err2 := strconv.ParseUint(m[3], 16, 64)
	if err1 != nil || err2 != nil || got != gpa || hva == 0 {
		return "", 0, false, fmt.Errorf("gpa2hva 0x%x: %w: %.160q", gpa, errHMP, text)
	}
	return m[2], hva, true, nil
}
