package lazymem

import (
	"errors"
	"testing"
)

// Where no word of g always has the address of the fault, as may be with another
// release of Go, none is taken for it.
func TestSearchLastFault(t *testing.T) {
	if offset, err := searchLastFault(fault); err != nil || offset == 0 {
		t.Errorf("%d, %v", offset, err)
	}
	for missed := range 3 {
		n := 0
		offset, err := searchLastFault(func(p *byte) {
			if n != missed {
				fault(p)
			}
			n++
		})
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("with fault %d not noted: %d, %v", missed, offset, err)
		}
	}
	if offset, err := searchLastFault(func(*byte) {}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("with no fault noted: %d, %v", offset, err)
	}
}
