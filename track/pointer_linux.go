//go:build !mips

package track

import "unsafe"

// A pointer stands in a 64-bit field: on 64-bit machines and 32-bit
// little-endian ones it comes first.
const (
	pointerPadBefore = 0
	pointerPadAfter  = 8 - unsafe.Sizeof(uintptr(0))
)
