package track

// On 32-bit big-endian machines the pointer in a 64-bit field comes last.
const (
	pointerPadBefore = 4
	pointerPadAfter  = 0
)
