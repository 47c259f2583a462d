package guest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// maxKernel bounds what a kernel may unpack to.
const maxKernel = 256 << 20

// extractVmlinux returns the ELF kernel inside a bzImage (boot protocol 2.08 and
// later name the payload: Documentation/arch/x86/boot.rst). Booted directly, by
// its PVH note, it spares an emulated CPU the decompression.
func extractVmlinux(image []byte) ([]byte, error) {
	if len(image) < 0x260 || string(image[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	sectors := int(image[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	start := uint64(sectors+1)*512 + uint64(binary.LittleEndian.Uint32(image[0x248:]))
	length := uint64(binary.LittleEndian.Uint32(image[0x24c:]))
	if start+length > uint64(len(image)) {
		return nil, errors.New("bzImage: payload outside the file")
	}
	vmlinux, err := unlz4Legacy(image[start:start+length], maxKernel)
	if err != nil {
		return nil, fmt.Errorf("bzImage payload: %w", err)
	}
	if !hasPVHNote(vmlinux) {
		return nil, errors.New("kernel has no PVH entry note")
	}
	return vmlinux, nil
}

// hasPVHNote tells whether QEMU will boot this ELF kernel: it looks for the Xen
// note 18 (XEN_ELFNOTE_PHYS32_ENTRY) in the program headers.
func hasPVHNote(kernel []byte) bool {
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return false
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<16 {
			continue
		}
		note := make([]byte, p.Filesz)
		if _, err := p.ReadAt(note, 0); err != nil {
			continue
		}
		for len(note) >= 12 {
			name := int(binary.LittleEndian.Uint32(note))
			desc := int(binary.LittleEndian.Uint32(note[4:]))
			kind := binary.LittleEndian.Uint32(note[8:])
			next := 12 + (name+3)&^3 + (desc+3)&^3
			if name < 0 || desc < 0 || next > len(note) {
				break
			}
			if kind == 18 && string(note[12:12+name]) == "Xen\x00" {
				return true
			}
			note = note[next:]
		}
	}
	return false
}

// A driver is loaded when a PCI device with one of the ids is there. A file system
// ("fs:TYPE") when a disk with it is mounted; ext4 is part of the kernel. What is
// loaded when it is wanted is "on:WHAT".
type driver struct{ ids, modules string }

// drivers of the guest; every one of a device needs the virtio PCI transport.
var drivers = []driver{
	{"1af4:1000,1041", "virtio_net"},
	{"1af4:1001,1042", "virtio_blk"},
	{"1af4:1002,1045", "virtio_balloon"},
	{"1af4:1003,1043", "virtio_console"},
	{"1af4:1004,1048", "virtio_scsi sd_mod"},
	{"1af4:1005,1044", "virtio_rng"},
	{"fs:xfs", "xfs"},
	{"on:power", "button evdev"},
}

// transport comes before any driver and is nobody's dependency.
const transport = "virtio_pci"

// findModules indexes the modules below dir by name ('-' written as '_').
func findModules(dir string) (map[string]string, error) {
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasSuffix(path, ".ko") {
			found[moduleName(strings.TrimSuffix(filepath.Base(path), ".ko"))] = path
		}
		return err
	})
	return found, err
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// moduleDepends reads the depends= word of a module's .modinfo.
func moduleDepends(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("%s: no .modinfo", path)
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for word := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(word, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}

// loadOrder is name and all it depends on, dependencies first.
func loadOrder(found map[string]string, name string) ([]string, error) {
	var order []string
	state := map[string]int{} // 1: being resolved, 2: done
	var visit func(string) error
	visit = func(name string) error {
		name = moduleName(name)
		switch state[name] {
		case 1:
			return fmt.Errorf("module %s depends on itself", name)
		case 2:
			return nil
		}
		path, ok := found[name]
		if !ok {
			return fmt.Errorf("module %s is not in the kernel package", name)
		}
		state[name] = 1
		depends, err := moduleDepends(path)
		if err != nil {
			return err
		}
		for _, d := range depends {
			if err := visit(d); err != nil {
				return err
			}
		}
		state[name] = 2
		order = append(order, name)
		return nil
	}
	err := visit(name)
	return order, err
}

// moduleFiles are the files of the initramfs that concern modules: /mods/list
// for guestd's modules.c and the modules it names.
func moduleFiles(modules string) ([]file, error) {
	found, err := findModules(modules)
	if err != nil {
		return nil, err
	}
	var list strings.Builder
	need := map[string]bool{}
	for _, d := range drivers {
		var all []string
		want := strings.Fields(d.modules)
		if !strings.HasPrefix(d.ids, "fs:") && !strings.HasPrefix(d.ids, "on:") {
			want = append([]string{transport}, want...)
		}
		for _, m := range want {
			order, err := loadOrder(found, m)
			if err != nil {
				return nil, err
			}
			all = append(all, order...)
		}
		fmt.Fprintf(&list, "%s %s\n", d.ids, strings.Join(all, " "))
		for _, m := range all {
			need[m] = true
		}
	}
	files := []file{{name: "mods", mode: modeDir | 0o755}, {name: "mods/list", mode: 0o644, data: []byte(list.String())}}
	names := make([]string, 0, len(need))
	for m := range need {
		names = append(names, m)
	}
	sort.Strings(names)
	for _, m := range names {
		data, err := os.ReadFile(found[m])
		if err != nil {
			return nil, err
		}
		files = append(files, file{name: "mods/" + m + ".ko", mode: 0o644, data: unsign(data)})
	}
	return files, nil
}

// unsign cuts off a module's appended signature: without lockdown the kernel
// does not ask for one, and checking it costs an emulated CPU milliseconds each.
func unsign(module []byte) []byte {
	const mark = "~Module signature appended~\n"
	if !bytes.HasSuffix(module, []byte(mark)) || len(module) < len(mark)+12 {
		return module
	}
	// struct module_signature: eight bytes of kinds and lengths, be32 sig_len.
	end := len(module) - len(mark)
	n := int(binary.BigEndian.Uint32(module[end-4:]))
	if n < 0 || n > end-12 {
		return module
	}
	return module[:end-12-n]
}
