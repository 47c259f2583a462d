package vm

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Backing is what holds the pages of a RAM block.
type Backing string

const (
	Anonymous   Backing = "anonymous"    // private anonymous memory
	AnonShared  Backing = "anon-shared"  // MAP_SHARED|MAP_ANONYMOUS: shmem without a name
	Memfd       Backing = "memfd"        // memfd_create, shared or private
	SharedFile  Backing = "shared-file"  // MAP_SHARED of a file
	PrivateFile Backing = "private-file" // MAP_PRIVATE of a file: the file plus private copies
	Hugetlb     Backing = "hugetlb"      // hugetlbfs or MFD_HUGETLB, any of the above
	Device      Backing = "device"       // a character device such as /dev/dax
)

// fsNames are the file systems RAM is seen on, by statfs magic.
var fsNames = map[int64]string{
	unix.TMPFS_MAGIC:           "tmpfs",
	unix.HUGETLBFS_MAGIC:       "hugetlbfs",
	unix.EXT4_SUPER_MAGIC:      "ext4",
	unix.XFS_SUPER_MAGIC:       "xfs",
	unix.BTRFS_SUPER_MAGIC:     "btrfs",
	unix.NFS_SUPER_MAGIC:       "nfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlay",
	unix.FUSE_SUPER_MAGIC:      "fuse",
	unix.RAMFS_MAGIC:           "ramfs",
	unix.V9FS_MAGIC:            "9p",
	unix.F2FS_SUPER_MAGIC:      "f2fs",
	0x2fc12fc1:                 "zfs",
	unix.CIFS_SUPER_MAGIC:      "cifs",
	unix.SMB2_SUPER_MAGIC:      "smb2",
}

// backingOf says what lies behind a mapping: the kind, the file system's name
// ("" for anonymous memory) and the file's path as QEMU sees it ("" without one).
func (p *Process) backingOf(v *VMA) (b Backing, fsType, path string, err error) {
	if v.Inode == 0 {
		if v.Is("ht") || strings.HasPrefix(v.Path, "/anon_hugepage") {
			return Hugetlb, "hugetlbfs", "", nil
		}
		return Anonymous, "", "", nil
	}
	var st unix.Statfs_t
	link := p.Path(fmt.Sprintf("map_files/%x-%x", v.Start, v.End))
	// map_files reaches the very file that is mapped even when its name was
	// removed; it wants CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, hence the name
	// as a second way.
	err = unix.Statfs(link, &st)
	stat := link
	if err != nil && !v.Deleted() && strings.HasPrefix(v.Path, "/") {
		stat = p.Path("root") + unescapePath(v.Path)
		err = unix.Statfs(stat, &st)
	}
	if err != nil {
		return "", "", "", fmt.Errorf("statfs of the file behind 0x%x (%s): %w", v.Start, v.Path, err)
	}
	fi, err := os.Stat(stat)
	if err != nil {
		return "", "", "", fmt.Errorf("stat of the file behind 0x%x (%s): %w", v.Start, v.Path, err)
	}
	fsType, ok := fsNames[int64(st.Type)]
	if !ok {
		fsType = fmt.Sprintf("0x%x", uint64(st.Type)&0xffffffff)
	}
	name := unescapePath(strings.TrimSuffix(v.Path, " (deleted)"))
	switch {
	case fi.Mode()&os.ModeDevice != 0:
		return Device, fsType, name, nil
	case fsType == "hugetlbfs":
		return Hugetlb, fsType, name, nil
	case strings.HasPrefix(v.Path, "/memfd:"):
		return Memfd, fsType, "", nil
	case strings.HasPrefix(v.Path, "/dev/zero (deleted)"), strings.HasPrefix(v.Path, "/SYSV"):
		return AnonShared, fsType, "", nil
	case v.Shared():
		return SharedFile, fsType, name, nil
	}
	return PrivateFile, fsType, name, nil
}

// unescapePath undoes the kernel's octal escapes (only newline in maps).
func unescapePath(s string) string { return strings.ReplaceAll(s, `\012`, "\n") }

// CanWriteProtect reports whether a synchronous write-protect userfaultfd takes
// this block, and if not, why: the kernel accepts anonymous memory, shmem (tmpfs,
// memfd, also mapped privately) and hugetlbfs.
func (b *RAMBlock) CanWriteProtect() (bool, string) {
	if b.Reported {
		return false, "the guest reports its free pages (free-page-reporting=on), and in a file one that is used again leaves no trace of it; anonymous memory does"
	}
	switch b.Backing {
	case Anonymous, AnonShared, Memfd, Hugetlb:
		return true, ""
	case SharedFile, PrivateFile:
		if b.FileType == "tmpfs" || b.FileType == "hugetlbfs" {
			return true, ""
		}
		return false, fmt.Sprintf("its file is on %s, which the kernel cannot write-protect", b.FileType)
	}
	return false, fmt.Sprintf("it is a mapping of %s", b.FilePath)
}
