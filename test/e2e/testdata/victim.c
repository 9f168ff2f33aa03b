/*
 * What the tests move and kill. Every process ends by itself after 20 seconds.
 *
 *   victim pause        wait for the end of standard input
 *   victim exec PROG    wait for a byte, then execute PROG
 *   victim bomb         wait for a byte, then fork without end; every child too
 */
#include <signal.h>
#include <string.h>
#include <unistd.h>

static void bomb(void)
{
	unsigned seed = getpid();

	signal(SIGCHLD, SIG_IGN); /* children leave no zombies */
	for (;;) {
		pid_t pid = fork();

		if (pid == 0) {
			alarm(20);
			seed = getpid();
		} else if (pid < 0) {
			usleep(500);
		} else {
			/* Some parents go, so that the tree keeps moving. */
			seed = seed * 1103515245 + 12345;
			if (seed >> 28 == 0)
				_exit(0);
		}
	}
}

int main(int argc, char **argv)
{
	char c;

	alarm(20);
	if (argc < 2)
		return 2;
	ssize_t n = read(0, &c, 1);

	if (!strcmp(argv[1], "pause"))
		return 0;
	if (n != 1)
		return 1;
	if (!strcmp(argv[1], "exec") && argc == 3) {
		char *args[] = { argv[2], NULL };

		execv(argv[2], args);
		return 3;
	}
	if (!strcmp(argv[1], "bomb"))
		bomb();
	return 2;
}
