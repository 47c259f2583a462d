package plan

import (
	"path/filepath"
	"slices"
	"strings"
)

// imageFile is a file that backs a drive or a block node.
type imageFile struct {
	file   File
	pflash bool
	set    func(path string) // writes another path into the command line
	mapped bool
}

// storage treats disks and firmware. A clone must not write into the original's
// files: flash gets a copy, whose content QEMU replaces by the RAMBlock's when
// the guest runs; any other writable image has to be mapped.
func (b *builder) storage() error {
	b.drop(func(e *entry) bool { return e.Name == "add-fd" })
	for _, e := range b.opts {
		if !strings.Contains(e.Value, "/dev/fdset/") && (e.kv == nil || !strings.Contains(e.kv.String(), "/dev/fdset/")) {
			continue
		}
		v := e.Value
		if e.kv != nil {
			v = e.kv.String()
		}
		at := strings.Index(v, "/dev/fdset/")
		if at < 0 {
			continue
		}
		set := v[at:]
		if n := strings.IndexFunc(set[len("/dev/fdset/"):], func(r rune) bool { return r < '0' || r > '9' }); n >= 0 {
			set = set[:len("/dev/fdset/")+n]
		}
		return b.refuse("-"+e.Name+" with "+set, "its manager had opened the file for it").
			WithHint("name the file: --map %s=/path/to/file", set)
	}
	imgs := b.blockImages()
	if b.opt.CloneID == "" {
		return nil
	}
	for _, im := range imgs {
		if !im.file.Writable || im.mapped || b.madeHere(im.file.Path) {
			continue
		}
		if !im.pflash {
			return b.refuse(im.file.Option+" "+im.file.Path, "a clone must not write to the original's disk").
				WithHint("give it a copy: --map %s=NEWPATH", im.file.Path)
		}
		to := b.own("pflash-" + filepath.Base(im.file.Path))
		b.plan.Copies = append(b.plan.Copies, Copy{From: im.file.Path, To: to})
		im.set(to)
		b.change(im.file.Option+" "+to, "a clone writes to a copy of the flash")
	}
	return nil
}

// images lists the files behind drives and block nodes.
func (b *builder) images() []File {
	var out []File
	for _, im := range b.blockImages() {
		out = append(out, im.file)
	}
	return out
}

func (b *builder) blockImages() []imageFile {
	var out []imageFile
	add := func(e *entry, path string, key string, writable, pflash bool) {
		if !localFile(path) {
			return
		}
		set := func(p string) { e.Value = p }
		if key != "" {
			set = func(p string) { e.kv.Set(key, p) }
		}
		out = append(out, imageFile{
			file:   File{Path: b.abs(path), Option: "-" + e.Name, Writable: writable, Firmware: pflash},
			pflash: pflash, set: set, mapped: e.mapped[key],
		})
	}
	for _, e := range b.opts {
		switch e.Name {
		case "hda", "hdb", "hdc", "hdd", "sd", "mtdblock", "fda", "fdb":
			add(e, e.Value, "", true, false)
		case "cdrom":
			add(e, e.Value, "", false, false)
		case "pflash":
			add(e, e.Value, "", true, true)
		case "drive":
			ro := e.isOn("readonly") || e.isOn("read-only") || e.get("media") == "cdrom" || e.isOn("snapshot")
			flash := e.get("if") == "pflash"
			for _, key := range []string{"file", "file.filename"} {
				if p := e.get(key); p != "" {
					add(e, p, key, !ro, flash)
				}
			}
		}
	}
	b.nodeImages(add)
	return out
}

// nodeImages lists the files of -blockdev graphs. A node opened read-only on
// demand (auto-read-only) is written to only when a node above it is.
func (b *builder) nodeImages(add func(e *entry, path, key string, writable, pflash bool)) {
	flash := map[string]bool{}
	for e := range b.named("machine", "M") {
		for _, key := range []string{"pflash0", "pflash1"} {
			if n := e.get(key); n != "" {
				flash[n] = true
			}
		}
	}
	for e := range b.named("global") { // -global driver=cfi.pflash01,property=drive,value=NODE
		if e.get("driver") == "cfi.pflash01" && e.get("property") == "drive" {
			flash[e.get("value")] = true
		}
	}
	type node struct{ ro, autoRO bool }
	nodes := map[string]node{}
	parentOf := map[string]string{}
	for e := range b.named("blockdev") {
		name := e.get("node-name")
		nodes[name] = node{ro: e.isOn("read-only"), autoRO: e.isOn("auto-read-only")}
		if below := e.get("file"); below != "" {
			parentOf[below] = name
		}
	}
	for e := range b.named("blockdev") {
		name := e.get("node-name")
		ro, isFlash := e.isOn("read-only"), flash[name]
		auto := e.isOn("auto-read-only")
		for up, hops := parentOf[name], 0; up != "" && hops < 64; up, hops = parentOf[up], hops+1 {
			isFlash = isFlash || flash[up]
			ro = ro || auto && nodes[up].ro
		}
		for _, key := range []string{"filename", "file.filename"} {
			if p := e.get(key); p != "" {
				add(e, p, key, !ro, isFlash)
			}
		}
	}
}

// localFile reports a name that is a file and not a protocol ("nbd:...") or an
// inherited descriptor.
func localFile(path string) bool {
	if path == "" || inheritedFD(path) {
		return false
	}
	if scheme, _, ok := strings.Cut(path, ":"); ok && !strings.ContainsRune(scheme, '/') {
		return false
	}
	return true
}

// files lists what must be on the host for the start to succeed.
func (b *builder) files() error {
	for _, im := range b.blockImages() {
		f := im.file
		if !under(f.Path, b.opt.RunDir) && !b.madeHere(f.Path) { // copies and disks are made later
			b.plan.Files = append(b.plan.Files, f)
		}
	}
	need := func(path, option string) {
		if localFile(path) {
			b.plan.Files = append(b.plan.Files, File{Path: b.abs(path), Option: option})
		}
	}
	for _, e := range b.opts {
		switch e.Name {
		case "kernel", "initrd", "dtb", "shim":
			need(e.Value, "-"+e.Name)
		case "bios":
			// A bare name is looked up in QEMU's own directories.
			if strings.ContainsRune(e.Value, '/') {
				need(e.Value, "-bios")
			}
		case "acpitable", "smbios", "fw_cfg":
			for _, key := range []string{"file", "data"} {
				if e.Name != "acpitable" && key == "data" {
					continue
				}
				for _, p := range strings.Split(e.get(key), ":") {
					need(p, "-"+e.Name)
				}
			}
		case "object":
			if strings.HasPrefix(e.get("qom-type"), "secret") {
				need(e.get("file"), "-object "+e.get("id"))
			}
		case "device":
			if rom := e.get("romfile"); strings.ContainsRune(rom, '/') {
				need(rom, "-device "+e.get("driver"))
			}
			if e.get("driver") == "loader" {
				need(e.get("file"), "-device loader")
			}
		case "pidfile":
			b.plan.Files = append(b.plan.Files, File{Path: b.abs(e.Value), Option: "-pidfile", Writable: true, Created: true})
		}
	}
	return nil
}

// madeHere reports a file of Plan.Disks.
func (b *builder) madeHere(path string) bool {
	return slices.ContainsFunc(b.plan.Disks, func(f DiskFile) bool { return f.Path == path })
}

func under(path, dir string) bool {
	return dir != "" && strings.HasPrefix(path, strings.TrimRight(dir, "/")+"/")
}
