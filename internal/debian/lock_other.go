//go:build !linux

package debian

// lock does nothing: there is no apt-get here to be kept apart from another.
func lock(string) (unlock func(), err error) {
	return func() {}, nil
}
