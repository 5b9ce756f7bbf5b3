package lazymem

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/go-uffd/uffd"
)

// An answer is what the kernel does with one call: it fills so many pages, and
// reports an error or not.
type answer struct {
	pages int
	err   error
}

// The kernel may fill a part of what it is asked for. It does so while other
// threads change the process's mappings, at moments that no test can choose.
func TestPutInParts(t *testing.T) {
	const page, first, pages = 4096, 3, 5
	failed := errors.New("failed")
	var patient, hopeless []answer
	for range 2 {
		for range maxTries {
			patient = append(patient, answer{0, uffd.ErrRetry})
		}
		patient = append(patient, answer{1, uffd.ErrRetry})
	}
	patient = append(patient, answer{3, nil})
	for range maxTries + 1 {
		hopeless = append(hopeless, answer{0, uffd.ErrRetry})
	}
	for _, test := range []struct {
		name    string
		answers []answer
		filled  int
		err     error
	}{
		{"at once", []answer{{5, nil}}, 5, nil},
		{"in parts", []answer{{2, uffd.ErrRetry}, {0, uffd.ErrRetry}, {1, uffd.ErrRetry}, {2, nil}}, 5, nil},
		{"fails", []answer{{0, failed}}, 0, failed},
		{"fails later", []answer{{3, uffd.ErrRetry}, {0, syscall.EEXIST}}, 3, syscall.EEXIST},
		{"fails behind a part", []answer{{3, failed}, {0, failed}}, 3, failed},
		{"each part after many tries", patient, 5, nil},
		{"never", hopeless, 0, uffd.ErrRetry},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := &Memory{base: 1 << 20, pageSize: page, pageShift: 12, pages: 10, missing: 10, present: make([]atomic.Uint64, 1)}
			f := &fill{m: m, at: first * page}
			var asked, want []string
			done, calls := 0, 0
			err := f.put(pages*page, func(to uffd.Addr, d int) (int64, error) {
				if calls == len(test.answers) {
					t.Fatalf("asked %d times", calls+1)
				}
				asked = append(asked, fmt.Sprint(to, d))
				want = append(want, fmt.Sprint(uffd.Addr(1<<20+(first+done)*page), done*page))
				a := test.answers[calls]
				calls++
				done += a.pages
				return int64(a.pages * page), a.err
			})
			if !errors.Is(err, test.err) || err != nil && test.err == nil || calls != len(test.answers) {
				t.Errorf("%v after %d calls, want %v after %d", err, calls, test.err, len(test.answers))
			}
			if !slices.Equal(asked, want) {
				t.Errorf("asked for %v, want %v", asked, want)
			}
			for i := range m.pages {
				if has := i >= first && i < first+test.filled; m.has(i) != has {
					t.Errorf("page %d is there: %t", i, m.has(i))
				}
			}
			if m.missing != m.pages-test.filled || f.at != (first+test.filled)*page {
				t.Errorf("%d pages are missing, the next is at %d", m.missing, f.at)
			}
		})
	}
}
