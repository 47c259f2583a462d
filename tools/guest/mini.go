package guest

import (
	"context"
	"os"
	"path/filepath"
)

// Mini returns the multiboot guest (QEMU's -kernel), built if it is not there
// yet. It runs under KVM and TCG, needs no interrupts, no 64-bit mode and no
// paging, and reports like the Linux guest; its command line is described in
// mini/main.c.
func Mini(ctx context.Context) (path string, err error) {
	src, names, err := sourceFiles("mini")
	if err != nil {
		return "", err
	}
	parts := [][]byte{[]byte(recipe)}
	for _, n := range names {
		parts = append(parts, []byte(n), src[n])
	}
	dir, err := artifact(ctx, "mini", stamp(parts...), func(dir string) error {
		elf, err := compile(ctx, src, names, "mini.elf", "-m32", "-march=i686", "-O2", "-ffreestanding",
			"-fno-pic", "-fno-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
			"-mno-sse", "-mno-mmx", "-mno-80387", "-Wall", "-Wextra", "-Werror",
			"-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-m,elf_i386", "-Wl,-T,mini.ld", "-Wl,-z,max-page-size=4096")
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "mini.elf"), elf, 0o755)
	})
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "mini.elf"), nil
}
