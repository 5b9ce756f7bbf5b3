package lazymem

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// getg returns the goroutine's g.
func getg() unsafe.Pointer

// lastFault returns where the runtime notes the address of the goroutine's last
// memory fault.
func lastFault() *uintptr { return (*uintptr)(unsafe.Add(getg(), lastFaultOffset)) }

// lastFaultOffset is where in g that is. It is found by trial, as it differs
// between releases of Go and between architectures.
var lastFaultOffset uintptr

// findLastFault sets lastFaultOffset.
var findLastFault = sync.OnceValue(func() (err error) {
	lastFaultOffset, err = searchLastFault(fault)
	return err
})

// searchLastFault has fault touch several addresses, and looks which word of g
// takes on the value of each. They are beginnings of pages, as s390x does not
// know more of an address than the page.
func searchLastFault(fault func(p *byte)) (offset uintptr, err error) {
	const words, probes = 48, 3 // g is larger
	pageSize := os.Getpagesize()
	mem, err := unix.Mmap(-1, 0, probes*pageSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, fmt.Errorf("lazymem: %w", err)
	}
	defer unix.Munmap(mem)
	var matches [words]int
	for page := range probes {
		p := &mem[page*pageSize]
		fault(p)
		for i := range matches {
			word := (*uintptr)(unsafe.Add(getg(), uintptr(i)*unsafe.Sizeof(uintptr(0))))
			if peek(word) == uintptr(unsafe.Pointer(p)) {
				matches[i]++
			}
		}
	}
	found := 0
	for i, n := range matches {
		if n == probes {
			offset = uintptr(i) * unsafe.Sizeof(uintptr(0))
			found++
		}
	}
	if found != 1 {
		return 0, fmt.Errorf("lazymem: this release of Go does not show where a goroutine has faulted, "+
			"so that swallowed faults could not be found out: %w", errors.ErrUnsupported)
	}
	return offset, nil
}

// fault reads what cannot be read.
func fault(p *byte) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { recover() }()
	runtime.KeepAlive(*p)
}
