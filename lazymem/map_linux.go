package lazymem

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// open maps the memory and registers it.
func (m *Memory) open(shared bool) (err error) {
	if err := findLastFault(); err != nil {
		return err
	}
	m.file, err = uffd.New(&uffd.Config{Require: uffd.FeatureSigbus})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			m.unmap()
		}
	}()
	length := m.pages << m.pageShift
	// The source may be larger than the machine's memory: most of it may never come.
	flags, huge := unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE, 0
	if m.pageSize != os.Getpagesize() {
		// MAP_HUGE_SHIFT and MFD_HUGE_SHIFT are the same.
		huge = m.pageShift << unix.MAP_HUGE_SHIFT
		flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_HUGETLB | huge // reserved: there are few
	}
	fd := -1
	if shared {
		if fd, err = memfd(length, huge); err != nil {
			return err
		}
		m.fd = os.NewFile(uintptr(fd), "lazymem")
		flags = unix.MAP_SHARED
	}
	// Without access until it is registered, so that mlockall(MCL_FUTURE) does
	// not fill it with zeros.
	m.mem, err = unix.Mmap(fd, 0, length, unix.PROT_NONE, flags)
	if err != nil {
		return fmt.Errorf("lazymem: mapping %d bytes in pages of %d: %w", length, m.pageSize, err)
	}
	if _, err := m.file.Register(uffd.RangeOf(m.mem), uffd.RegisterMissing); err != nil {
		return err
	}
	if err := unix.Mprotect(m.mem, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("lazymem: mprotect: %w", err)
	}
	// A forked child would read zeros. Its parent's userfaultfd is not its own.
	if err := unix.Madvise(m.mem, unix.MADV_DONTFORK); err != nil {
		return fmt.Errorf("lazymem: madvise(MADV_DONTFORK): %w", err)
	}
	return nil
}

// memfd makes a memfd whose size nobody can change.
func memfd(length, huge int) (int, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	if huge != 0 {
		flags |= unix.MFD_HUGETLB | huge
	}
	fd, err := unix.MemfdCreate("lazymem", flags)
	if err != nil {
		return -1, fmt.Errorf("lazymem: memfd_create: %w", err)
	}
	err = unix.Ftruncate(fd, int64(length))
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("lazymem: making a memfd of %d bytes: %w", length, err)
	}
	return fd, nil
}

// unmap gives everything back but the addresses: whoever still touches them gets
// a fault. They go when nobody holds m any more, which those inside its methods
// do. The userfaultfd is closed last: without it, missing pages would read as
// zeros.
func (m *Memory) unmap() error {
	if m.mem != nil {
		_, err := unix.MmapPtr(-1, 0, unsafe.Pointer(unsafe.SliceData(m.mem)), uintptr(len(m.mem)),
			unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED)
		if err != nil {
			return fmt.Errorf("lazymem: giving the memory back: %w", err)
		}
		runtime.AddCleanup(m, func(mem []byte) { unix.Munmap(mem) }, m.mem)
	}
	if m.fd != nil {
		m.fd.Close()
	}
	return m.file.Close()
}

// discard empties whole pages.
func (m *Memory) discard(mem []byte) error {
	advice := unix.MADV_DONTNEED
	if m.fd != nil {
		advice = unix.MADV_REMOVE
	}
	err := unix.Madvise(mem, advice)
	switch {
	case err != unix.EINVAL:
		return err
	case m.fd == nil && m.pageSize != os.Getpagesize():
		return fmt.Errorf("private huge pages need Linux 5.18, and must not be locked: %w", err)
	}
	return fmt.Errorf("the memory is locked (mlock, mlockall): %w", err)
}

func (m *Memory) dup() (*os.File, error) {
	fd, err := unix.FcntlInt(m.fd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("lazymem: File: %w", err)
	}
	return os.NewFile(uintptr(fd), "lazymem"), nil
}
