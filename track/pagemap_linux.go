package track

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// pmScanArg is struct pm_scan_arg of <linux/fs.h>. It holds the regions as a
// pointer, padded to 64 bits: the collector and whatever moves stacks have to
// know it.
type pmScanArg struct {
	size     uint64
	flags    uint64
	start    uint64
	end      uint64
	walkEnd  uint64 // out
	_        [pointerPadBefore]byte
	vec      unsafe.Pointer
	_        [pointerPadAfter]byte
	vecLen   uint64
	maxPages uint64
	inverted uint64
	mask     uint64
	anyOf    uint64
	returned uint64
}

const (
	scanWPMatching   = 1 << 0 // PM_SCAN_WP_MATCHING
	scanCheckWPAsync = 1 << 1 // PM_SCAN_CHECK_WPASYNC

	// _IOWR('f', 16, struct pm_scan_arg), which all architectures encode alike.
	reqPagemapScan = 0xc000_0000 | uint32(unsafe.Sizeof(pmScanArg{}))<<16 | 'f'<<8 | 16
)

// A mirror of another size than the kernel's does not compile.
var (
	_ [96]byte = [unsafe.Sizeof(pmScanArg{})]byte{}
	_ [24]byte = [unsafe.Sizeof(Region{})]byte{}
)

func (p *Pagemap) scan(s *Scan, regions []Region) (n int, next uffd.Addr, err error) {
	arg := pmScanArg{
		size:     uint64(unsafe.Sizeof(pmScanArg{})),
		start:    uint64(s.Range.Start),
		end:      uint64(s.Range.End()),
		maxPages: s.MaxPages,
		inverted: uint64(s.Inverted),
		mask:     uint64(s.mask()),
		anyOf:    uint64(s.AnyOf),
		returned: uint64(s.Return),
	}
	if len(regions) > 0 {
		arg.vec, arg.vecLen = unsafe.Pointer(unsafe.SliceData(regions)), uint64(len(regions))
	}
	if s.CheckAsync {
		arg.flags |= scanCheckWPAsync
	}
	if s.Protect {
		arg.flags |= scanWPMatching
	}
	conn, err := p.file.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	var found uintptr
	var e unix.Errno
	err = conn.Control(func(fd uintptr) {
		found, _, e = unix.Syscall(unix.SYS_IOCTL, fd, uintptr(reqPagemapScan), uintptr(unsafe.Pointer(&arg)))
	})
	switch {
	case err != nil:
		return 0, 0, os.ErrClosed
	case e == 0:
		return int(found), uffd.Addr(arg.walkEnd), nil
	case e == unix.ENOTTY:
		return 0, 0, fmt.Errorf("PAGEMAP_SCAN needs Linux 6.7: %w", errors.ErrUnsupported)
	case s.Protect:
		// The kernel does not say how much it did before it failed. It has
		// written the regions that it protected, though, and is not going to
		// report those pages again.
		for n < len(regions) && regions[n].End != 0 {
			n++
		}
	}
	switch e {
	case unix.ESRCH:
		return n, 0, fmt.Errorf("%w: %w", uffd.ErrGone, e)
	case unix.EPERM:
		return n, 0, fmt.Errorf("memory that is not write-protected with FeatureWPAsync: %w", e)
	}
	return n, 0, e
}
