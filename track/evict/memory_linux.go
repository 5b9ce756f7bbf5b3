package evict

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// A mapping is a line that begins one in /proc/PID/smaps.
type mapping struct {
	start, end, offset, inode uint64
	major, minor              uint32
	mode                      string
}

// checkMapping checks that r of a process is the file, from its start on, and is
// not shared with forked children.
func checkMapping(pid int, r uffd.Range, file *os.File) error {
	var stat unix.Stat_t
	var fs unix.Statfs_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
		return err
	}
	if err := unix.Fstatfs(int(file.Fd()), &fs); err != nil {
		return err
	}
	if int64(fs.Type) != unix.TMPFS_MAGIC {
		return invalid("the file is not shared memory of small pages (memfd, tmpfs)")
	}
	if uint64(stat.Size) < r.Len {
		return invalid("the file has %d bytes, the range %d", stat.Size, r.Len)
	}
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return err
	}
	var v mapping
	next := r.Start // up to there all is well
	for line := range strings.Lines(string(smaps)) {
		var head mapping
		if n, _ := fmt.Sscanf(line, "%x-%x %s %x %x:%x %d", &head.start, &head.end, &head.mode, &head.offset,
			&head.major, &head.minor, &head.inode); n == 7 {
			v = head
			continue
		}
		flags, ok := strings.CutPrefix(line, "VmFlags:")
		from, to := max(v.start, uint64(r.Start)), min(v.end, uint64(r.End()))
		if !ok || from >= to {
			continue
		}
		if v.inode != stat.Ino || unix.Mkdev(v.major, v.minor) != uint64(stat.Dev) || !strings.HasSuffix(v.mode, "s") ||
			from != uint64(next) || v.offset+from-v.start != from-uint64(r.Start) {
			return invalid("what is mapped at %v is not the file from its start on, shared", uffd.Addr(from))
		}
		if !slices.Contains(strings.Fields(flags), "dc") {
			return invalid("forked children would find zeros in %v: the process has to MADV_DONTFORK it", r)
		}
		next = uffd.Addr(to)
	}
	if next != r.End() {
		return invalid("nothing is mapped at %v of process %d", next, pid)
	}
	return nil
}

// reopen opens a file once more.
func reopen(f *os.File) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
}

func allocate(f *os.File, size int64) error {
	return ignoringEINTR(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, size) })
}

// punch frees the memory of a file.
func punch(f *os.File, off, size int64) error {
	return ignoringEINTR(func() error {
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, size)
	})
}

// nextPage returns the offset of the first page at or behind off that exists, -1
// if there is none.
func nextPage(f *os.File, off int64) (int64, error) {
	at, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if err == unix.ENXIO {
		return -1, nil
	}
	return at, err
}

func ignoringEINTR(do func() error) error {
	for {
		if err := do(); err != unix.EINTR {
			return err
		}
	}
}
