/* KAITO's pause container: ends at any signal, but as PID 1 of a pod, where it reaps. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void woken(int signal) {
    if (getpid() == 1 && signal == SIGCHLD) {
        while (waitpid(-1, 0, WNOHANG) > 0) {
        }
        return;
    }
    _exit(0);
}

int main(void) {
    for (int signal_number = 1; signal_number < 32; signal_number++)
        signal(signal_number, woken);
    for (;;)
        pause();
}
