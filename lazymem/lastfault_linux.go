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
var findLastFault = sync.OnceValue(func() error {
	const words = 48 // g is larger
	pageSize := os.Getpagesize()
	mem, err := unix.Mmap(-1, 0, 2*pageSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("lazymem: %w", err)
	}
	defer unix.Munmap(mem)
	var candidates [words]int
	probes := []int{0, pageSize / 2, pageSize}
	for _, off := range probes {
		fault(&mem[off])
		addr := uintptr(unsafe.Pointer(&mem[off]))
		for i := range candidates {
			if peek((*uintptr)(unsafe.Add(getg(), uintptr(i)*unsafe.Sizeof(addr)))) == addr {
				candidates[i]++
			}
		}
	}
	found := 0
	for i, n := range candidates {
		if n == len(probes) {
			lastFaultOffset = uintptr(i) * unsafe.Sizeof(uintptr(0))
			found++
		}
	}
	if found != 1 {
		return fmt.Errorf("lazymem: this release of Go does not show where a goroutine has faulted, "+
			"so that swallowed faults could not be found out: %w", errors.ErrUnsupported)
	}
	return nil
})

// fault reads what cannot be read.
func fault(p *byte) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { recover() }()
	runtime.KeepAlive(*p)
}
