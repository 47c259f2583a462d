package plan

import (
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// maxNodes bounds how far a block graph is followed.
const maxNodes = 64

// Disk is a writable drive of which the checkpoint has the content.
type Disk struct {
	Name   string // drive id, device id or QOM path
	Device string // name of the backend that -drive or a short form made
	Node   string // top node of the medium
	Path   string // of the original image, as QEMU names it
	// Wrapped says that the content is an image of the original's own format, which
	// was left encrypted: the driver of that format stays on top.
	Wrapped bool
}

// DiskFile is the file that takes the place of a drive's original image: an overlay
// over the checkpoint's volumes, to be made before QEMU is started.
type DiskFile struct {
	Name   string `json:"name"`
	Path   string `json:"path"`
	Direct bool   `json:"direct"` // opened past the host's page cache
}

// disks gives every drive of the checkpoint a file of its own. All that the guest or
// the operator sees of the drive stays: ids, node names, serials, throttling, cache
// and discard modes; what names the original image, its format and its backing chain
// goes.
func (b *builder) disks() error {
	if len(b.rec.Disks) == 0 {
		return nil
	}
	before := b.unusedNodes()
	if b.rec.Libvirt {
		// libvirt makes none for nothing: these were of a medium whose place another
		// one has taken, and their files are not QEMU's any more.
		before = nil
	}
	for _, d := range b.rec.Disks {
		file, mapped := b.maps.file(d.Path)
		if !mapped {
			file = filepath.Join(b.opt.DiskDir, b.diskName(d))
		}
		file = b.abs(file)
		if slices.ContainsFunc(b.plan.Disks, func(f DiskFile) bool { return f.Path == file }) {
			return b.refuse("drive "+d.Name, "it would share the file %s with another one", file)
		}
		e := b.driveEntry(d)
		direct := false
		switch {
		case e == nil:
			node, ok := b.nodeEntry(d.Node)
			if !ok {
				return b.refuse("drive "+d.Name, "no option of the recorded command line opens its image %s", d.Path).
					WithHint("inspect the checkpoint: its command line lacks the drive")
			}
			var err error
			if direct, err = b.replaceNode(node, d, file); err != nil {
				return err
			}
		case e.kv == nil: // -hda and its kin, whose format is probed
			if d.Wrapped {
				return b.refuse("-"+e.Name+" "+e.Value, "an encrypted image cannot be given that way")
			}
			e.Value = file
		default:
			replaceDrive(e, d, file)
			direct = isOn(e.get("cache.direct")) || e.get("cache") == "none" || e.get("cache") == "directsync"
		}
		b.plan.Disks = append(b.plan.Disks, DiskFile{Name: d.Name, Path: file, Direct: direct})
		b.change("drive "+d.Name+": "+file, "it holds what the disk held at the checkpoint; the original "+d.Path+" is not touched")
	}
	b.dropUnused(before)
	return nil
}

// diskName is a file name for a drive, readable and different for each.
func (b *builder) diskName(d Disk) string {
	clean := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.' {
			return r
		}
		return '_'
	}, strings.TrimLeft(d.Name, "#/."))
	if len(clean) > 100 {
		clean = clean[len(clean)-100:]
	}
	name := clean + ".qcow2"
	for i := 2; slices.ContainsFunc(b.plan.Disks, func(f DiskFile) bool { return filepath.Base(f.Path) == name }); i++ {
		name = clean + "-" + strconv.Itoa(i) + ".qcow2"
	}
	return name
}

// driveEntry finds the -drive or short form of a disk: by its id, or, as ids that
// QEMU makes up are not on the command line, by its image.
func (b *builder) driveEntry(d Disk) *entry {
	if d.Device == "" {
		return nil
	}
	for e := range b.named("drive") {
		if e.get("id") == d.Device {
			return e
		}
	}
	for _, e := range b.opts {
		path := ""
		switch e.Name {
		case "hda", "hdb", "hdc", "hdd", "sd", "mtdblock", "fda", "fdb":
			path = e.Value
		case "drive":
			if e.get("id") == "" {
				path = e.get("file")
				if path == "" {
					path = e.get("file.filename")
				}
			}
		}
		if path != "" && (b.abs(path) == b.abs(d.Path) || b.abs(path) == b.abs(b.maps.path(d.Path, true))) {
			return e
		}
	}
	return nil
}

// formatKey reports a key of the original's format that means nothing, or something
// else, to a qcow2 overlay.
func formatKey(key string) bool {
	return strings.HasPrefix(key, "encrypt.") || slices.Contains([]string{"driver", "offset", "size", "force_size_calc",
		"prealloc-size", "prealloc-mode", "subformat", "log-size", "block-size", "key-secret"}, key)
}

// imageKey reports a key that says where an image comes from.
func imageKey(key string) bool {
	for _, p := range []string{"file", "backing", "data-file"} {
		if key == p || strings.HasPrefix(key, p+".") {
			return true
		}
	}
	return false
}

// replaceDrive has a -drive open another file.
func replaceDrive(e *entry, d Disk, file string) {
	e.deleteKeys("", imageKey)
	if d.Wrapped {
		e.kv.Set("file.driver", "qcow2")
		e.kv.Set("file.file.driver", "file")
		e.kv.Set("file.file.filename", file)
		return
	}
	e.deleteKeys("", formatKey)
	e.kv.Set("file", file)
	e.kv.Set("format", "qcow2")
}

// nodeEntry finds the -blockdev of a node.
func (b *builder) nodeEntry(name string) (*entry, bool) {
	if name == "" || strings.HasPrefix(name, "#") {
		return nil, false
	}
	for e := range b.named("blockdev") {
		if e.get("node-name") == name {
			return e, true
		}
	}
	return nil, false
}

// notBelow reports a key about other images than the one in "file".
func notBelow(key string) bool {
	return imageKey(key) && key != "file" && !strings.HasPrefix(key, "file.")
}

// filters are drivers that pass on what is below them, which is their child "file".
var filters = []string{"throttle", "copy-on-read", "preallocate", "compress"}

// protocols are drivers of what is not an image in something else.
var protocols = []string{"file", "host_device", "nbd", "rbd", "iscsi", "nfs", "ssh", "http", "https", "gluster",
	"nvme", "io_uring", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa", "null-co", "null-aio"}

// replaceNode has a block graph read and write another file. It reports whether that
// is opened past the page cache.
func (b *builder) replaceNode(e *entry, d Disk, file string) (direct bool, err error) {
	prefix := "" // of the keys of a node that is written inside another one
	driver := func() string { return e.get(prefix + "driver") }
	at := func() string { return "-blockdev node-name=" + e.get("node-name") }
	down := func() error { // to the child "file", which is a reference or inline
		child := e.get(prefix + "file")
		if child == "" {
			prefix += "file."
			if driver() == "" {
				return b.refuse(at(), "its image cannot be found on the command line")
			}
			return nil
		}
		below, ok := b.nodeEntry(child)
		if !ok {
			return b.refuse(at(), "there is no node %s", child)
		}
		e, prefix = below, ""
		return nil
	}
	for i := 0; slices.Contains(filters, driver()); i++ {
		if i == maxNodes {
			return false, b.refuse(at(), "more than %d filters on top of each other", maxNodes)
		}
		if err := down(); err != nil {
			return false, err
		}
	}
	direct = isOn(e.get(prefix + "cache.direct"))
	if !d.Wrapped && !slices.Contains(protocols, driver()) {
		e.deleteKeys(prefix, func(key string) bool { return key != "driver" && (formatKey(key) || notBelow(key)) })
		e.kv.Delete(prefix + "backing") // null is not listed
		e.kv.Set(prefix+"driver", "qcow2")
		if err := down(); err != nil {
			return false, err
		}
		direct = direct || isOn(e.get(prefix+"cache.direct"))
		e.deleteKeys(prefix, func(key string) bool { return !slices.Contains(nodeKeys, key) && !slices.Contains(fileKeys, key) })
		e.kv.Set(prefix+"driver", "file")
		e.kv.Set(prefix+"filename", file)
		return direct, nil
	}
	if d.Wrapped {
		e.deleteKeys(prefix, notBelow)
		if err := down(); err != nil {
			return false, err
		}
		direct = direct || isOn(e.get(prefix+"cache.direct"))
	}
	// The protocol node itself becomes the overlay, with the file inside it.
	aio := e.get(prefix + "aio")
	e.deleteKeys(prefix, func(key string) bool { return !slices.Contains(nodeKeys, key) })
	e.kv.Set(prefix+"driver", "qcow2")
	e.kv.Set(prefix+"file.driver", "file")
	e.kv.Set(prefix+"file.filename", file)
	if aio != "" {
		e.kv.Set(prefix+"file.aio", aio)
	}
	return direct, nil
}

// nodeKeys are keys that every node understands, fileKeys further ones of driver file.
var (
	nodeKeys = []string{"driver", "node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "force-share",
		"cache.direct", "cache.no-flush", "cache"}
	fileKeys = []string{"filename", "aio", "aio-max-batch", "locking"}
)

// deleteKeys deletes the keys of a node for which del is true of what follows its
// prefix, and the JSON objects that are empty then.
func (e *entry) deleteKeys(prefix string, del func(key string) bool) {
	for _, key := range e.kv.Keys() {
		rest, ok := strings.CutPrefix(key, prefix)
		if !ok || !del(rest) {
			continue
		}
		e.kv.Delete(key)
		for up := strings.LastIndexByte(rest, '.'); up > 0; up = strings.LastIndexByte(rest[:up], '.') {
			parent := prefix + rest[:up]
			if !slices.ContainsFunc(e.kv.Keys(), func(k string) bool { return strings.HasPrefix(k, parent+".") }) {
				e.kv.Delete(parent)
			}
		}
	}
}

// dropUnused removes the nodes that only the replaced images used: they would open
// files of the original. What nothing used before either is the operator's business.
func (b *builder) dropUnused(before map[string]bool) {
	for range maxNodes {
		now, n := b.unusedNodes(), len(b.opts)
		b.drop(func(e *entry) bool {
			name := e.get("node-name")
			return e.Name == "blockdev" && now[name] && !before[name]
		})
		if len(b.opts) == n {
			return
		}
	}
}

// unusedNodes are the nodes whose name is no other option's value.
func (b *builder) unusedNodes() map[string]bool {
	unused := map[string]bool{}
	for e := range b.named("blockdev") {
		unused[e.get("node-name")] = true
	}
	for _, e := range b.opts {
		if e.kv == nil {
			continue
		}
		for _, key := range e.kv.Keys() {
			if v := e.get(key); key != "node-name" && unused[v] {
				delete(unused, v)
			}
		}
	}
	return unused
}
