package lazymem

// The runtime notes in each goroutine's g the address of its last memory fault,
// and leaves it there when the panic has been recovered from. That is the only
// trace of a fault that somebody else recovered from.

// peek and poke are kept from the race detector: the runtime's own accesses to g
// are not known to it, and g's are used again for other goroutines.

//go:norace
func peek(last *uintptr) uintptr { return *last }

//go:norace
func poke(last *uintptr, addr uintptr) { *last = addr }
